"""`llm2vec-fast doctor`: what this machine offers, and what the library chooses on it."""

from __future__ import annotations

import json
import platform
from typing import Annotated, Any

import typer

ROOMS = ("reference", "blocked", "triton", "flash")
CPU_FEATURES = ("avx2", "avx512_f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "neon", "bf16", "sve", "sve2")


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Show versions, devices, CPU features, and what is chosen on this machine with the reason.

    Paste the output into a bug report.
    """
    report = {
        "versions": {"python": platform.python_version(), **_versions()},
        "devices": _devices(),
        "cpu": _cpu(),
        "dtype auto": _dtypes(),
        "backends": _backends(),
        "tokenizers": _tokenizers(),
        "free": _free(),
    }
    if as_json:
        print(json.dumps(report, ensure_ascii=False, indent=1))
    else:
        _print(report)


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in (
        *("llm2vec-fast", "torch", "triton", "transformers", "tokenizers", "peft", "safetensors", "numpy", "pyarrow"),
        *("flash-attn", "gguf", "accelerate"),
    ):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _devices() -> dict[str, str]:
    import torch

    found = {"cpu": f"{torch.get_num_threads()} threads of {_cpus()} usable CPUs"}
    for number in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(number)
        kind = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        found[f"cuda:{number}"] = f"{card.name}, {_gigabytes(card.total_memory)}, {card.major}.{card.minor}, {kind}"
    if torch.xpu.is_available():
        for number in range(torch.xpu.device_count()):
            found[f"xpu:{number}"] = torch.xpu.get_device_name(number)
    if torch.backends.mps.is_available():
        found["mps"] = "Apple GPU"
    return found


def _cpus() -> int:
    import psutil

    try:
        return len(psutil.Process().cpu_affinity())
    except AttributeError:  # macOS has no affinity
        return psutil.cpu_count() or 1


def _cpu() -> dict[str, str]:
    """The processor, and those of its features that decide speed."""
    import torch

    from llm2vec_fast.jobs.environment import processor_name

    found = {"name": processor_name(), "PyTorch uses": torch.backends.cpu.get_cpu_capability()}
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    known = {name: capabilities[name] for name in CPU_FEATURES if name in capabilities}
    return found | {name: "yes" if there else "no" for name, there in known.items()}


def _free() -> dict[str, str]:
    import shutil

    import psutil
    from huggingface_hub.constants import HF_HUB_CACHE

    memory = psutil.virtual_memory()
    return {
        "memory": f"{_gigabytes(memory.available)} of {_gigabytes(memory.total)}",
        "disk here": _gigabytes(shutil.disk_usage(".").free),
        "model cache": f"{HF_HUB_CACHE}",
    }


def _tokenizers() -> dict[str, str]:
    import os

    setting = os.environ.get("TOKENIZERS_PARALLELISM", "not set")
    return {"kind": "fast ones (Rust) only, in threads", "TOKENIZERS_PARALLELISM": setting}


def _dtypes() -> dict[str, dict[str, str]]:
    """What dtype "auto" is on each device here, and why."""
    from llm2vec_fast.precision import choose_dtype

    found = {}
    for device in _devices():
        choice = choose_dtype("auto", device)
        found[device] = {"chosen": str(choice.dtype).removeprefix("torch."), "why": choice.reason}
    return found


def _backends() -> dict[str, dict[str, str]]:
    """For each operation and device type here, the implementation that runs and why."""
    import torch

    from llm2vec_fast.kernels.attention import flash

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else []), *(["xpu"] if torch.xpu.is_available() else [])]
    found = {}
    for operation, rooms in _operations().items():
        for device in devices:
            found[f"{operation} on {device}"] = _backend(operation, device, rooms)
            if "flash" in rooms:
                choice = flash.describe(torch.device(device))
                found[f"flash-attn on {device}"] = {"chosen": choice.backend, "why": choice.reason}
    return found


def _backend(operation: str, device: str, rooms: tuple[str, ...]) -> dict[str, str]:
    """What "auto" takes for an ordinary call; the environment may ask for what cannot run, which is worth a line."""
    import torch

    from llm2vec_fast.kernels.attention import flash
    from llm2vec_fast.kernels.dispatch import BackendUnavailableError, choose

    described = flash.describe(torch.device(device))
    refused = {"flash": described.reason} if described.backend == "none" else {}
    try:
        choice = choose(operation, "auto", device, rooms, refused=refused)
    except (BackendUnavailableError, ValueError) as error:
        return {"chosen": "none", "why": str(error)}
    return {"chosen": choice.backend, "why": choice.reason}


def _operations() -> dict[str, tuple[str, ...]]:
    """Operations by name, with the implementations that exist."""
    from pathlib import Path

    from llm2vec_fast import kernels

    rooms = {
        folder.name: tuple(name for name in ROOMS if (folder / f"{name}.py").is_file())
        for folder in sorted(Path(str(kernels.__file__)).parent.iterdir())
    }
    return {name: there for name, there in rooms.items() if "reference" in there}


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"


def _print(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    for title, values in report.items():
        table = Table(
            title=title, title_justify="left", title_style="bold", box=None, show_header=False, pad_edge=False
        )
        for name, value in values.items():
            cells = value.values() if isinstance(value, dict) else [value]
            table.add_row(Text(name, style="cyan"), *(Text(str(cell)) for cell in cells))
        console.print(table)
        console.print()
