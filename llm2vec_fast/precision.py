"""Which dtype a model runs in, and why: bfloat16 is a gain on some processors and a hundredfold loss on others."""

from __future__ import annotations

from dataclasses import dataclass

import torch

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class DtypeChoice:
    """The dtype a model runs in, and the reason in words."""

    dtype: torch.dtype
    reason: str


def choose_dtype(requested: str | torch.dtype | None, device: torch.device | str) -> DtypeChoice:
    """Pick the dtype for a model on ``device``; "auto" (or None) picks the fastest that keeps an embedding's direction.

    On a CPU "auto" is bfloat16 only with AVX512-BF16 or AMX: without them PyTorch emulates it, about 100 times slower.

    Raises:
        ValueError: the dtype's name is unknown.
    """
    if isinstance(requested, torch.dtype):
        return DtypeChoice(requested, "asked for")
    if requested not in (None, "auto"):
        name = requested.removeprefix("torch.")
        if name not in DTYPES:
            raise ValueError(f"dtype={requested!r} is unknown: choose auto or one of {', '.join(DTYPES)}")
        return DtypeChoice(DTYPES[name], "asked for")
    kind = torch.device(device).type
    if kind == "cpu":
        return _choose_for_cpu()
    if kind == "cuda":
        return _choose_for_cuda(torch.device(device))
    if kind == "xpu":
        return DtypeChoice(torch.bfloat16, "xpu devices compute in bfloat16")
    return DtypeChoice(torch.float32, f"bfloat16 is not known to be fast on {kind} devices")


def cpu_bfloat16_features() -> list[str]:
    """Instruction sets of this CPU that multiply bfloat16 matrices, by name; empty where it would be emulated."""
    probes = {"AVX512-BF16": "_is_avx512_bf16_supported", "AMX": "_is_amx_tile_supported"}
    return [name for name, probe in probes.items() if getattr(torch.cpu, probe, lambda: False)()]


def _choose_for_cpu() -> DtypeChoice:
    features = cpu_bfloat16_features()
    if features:
        return DtypeChoice(torch.bfloat16, f"this CPU has {' and '.join(features)}")
    return DtypeChoice(
        torch.float32, "this CPU has neither AVX512-BF16 nor AMX, without which bfloat16 is about 100 times slower"
    )


def _choose_for_cuda(device: torch.device) -> DtypeChoice:
    # is_bf16_supported() alone is true on older cards too, which emulate it.
    with torch.cuda.device(device):
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    name = torch.cuda.get_device_name(device)
    if native:
        return DtypeChoice(torch.bfloat16, f"{name} computes in bfloat16")
    return DtypeChoice(torch.float32, f"{name} has no bfloat16, and float16 overflows in many language models")
