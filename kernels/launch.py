"""What Triton kernels share when they are launched."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def readable(rows: Tensor) -> Tensor:
    """Rows (R, d) as they are, whatever their stride; a copy only where the elements of a row do not touch."""
    return rows if rows.stride(1) == 1 else rows.contiguous()


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; the CPU, where Triton only interprets, counts as two."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return torch.xpu.get_device_properties(device).max_compute_units if device.type == "xpu" else 2


@cache
def architecture_of(device: torch.device) -> str:
    """The architecture's name for a device; the CPU, where Triton only interprets, counts as sm_80."""
    if device.type == "cuda" and torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    if device.type == "cuda":
        major, _ = torch.cuda.get_device_capability(device)
        return f"sm_{major}0"
    return "sm_80"
