"""What the last bits of a number depend on beside the model, the texts and the settings."""

from __future__ import annotations

import contextlib
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

LIBRARIES = ("llm2vec-fast", "torch", "triton", "transformers", "tokenizers", "peft", "numpy", "pyarrow")
Environment = dict[str, str | int | bool | None]


def library_versions() -> dict[str, str | None]:
    """Versions of the libraries that decide the numbers; None where one is not installed."""
    found: dict[str, str | None] = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def describe_device(device: str) -> Environment:
    """The device that computes, and how PyTorch uses it: its name, instruction sets, threads, or CUDA release."""
    import torch

    place = torch.device(device)
    if place.type == "cuda":
        return {
            "device": "cuda",
            "device name": torch.cuda.get_device_name(place),
            "CUDA": torch.version.cuda or torch.version.hip,
            "TF32": torch.backends.cuda.matmul.allow_tf32,
        }
    if place.type != "cpu":
        return {"device": place.type, "device name": platform.machine()}
    return {
        "device": "cpu",
        "device name": processor_name(),
        "instruction set": torch.backends.cpu.get_cpu_capability(),
        "oneDNN": torch.backends.mkldnn.is_available(),
        "MKL": torch.backends.mkl.is_available(),
        "threads": torch.get_num_threads(),
    }


def processor_name() -> str:
    """The CPU's name, or its architecture where the system does not tell more."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
