"""One hand-picked launch configuration a kernel, head size, dtype and architecture: nothing is tuned at run time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class Configuration:
    """Tile sizes in rows, warps a program and pipeline stages."""

    block_q: int
    block_k: int
    warps: int
    stages: int

    def arguments(self) -> dict[str, int]:
        """As a kernel's launch takes them, by name."""
        return {
            "BLOCK_Q": self.block_q,
            "BLOCK_K": self.block_k,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


def block_d(head_dim: int) -> int:
    """The head size as the tile sees it: a power of two that a matrix instruction takes."""
    return max(16, 1 << (head_dim - 1).bit_length())


@cache
def forward(head_dim: int, dtype: torch.dtype, architecture: str) -> Configuration:
    """How the forward kernel is launched for a head size, dtype and architecture ("sm_80", "sm_90", "gfx942", …)."""
    width = block_d(head_dim)
    if dtype == torch.float32:
        return Configuration(64, 32, 4, 2) if width <= 128 else Configuration(32, 32, 4, 2)
    if width <= 64:
        return Configuration(128, 64, 4, 3 if architecture == "sm_90" else 2)
    if width == 128:
        return Configuration(128, 64, 8, 2)
    return Configuration(64, 32, 4, 2)


@cache
def backward_keys(head_dim: int, dtype: torch.dtype, architecture: str) -> Configuration:
    """How the dK and dV kernel is launched."""
    width = block_d(head_dim)
    if dtype == torch.float32:
        return Configuration(32, 32, 4, 1)
    if width <= 128:
        return Configuration(64, 64, 4, 2)
    return Configuration(32, 32, 4, 1)


@cache
def backward_queries(head_dim: int, dtype: torch.dtype, architecture: str) -> Configuration:
    """How the dQ kernel is launched."""
    width = block_d(head_dim)
    if dtype == torch.float32:
        return Configuration(32, 32, 4, 1)
    if width <= 128:
        return Configuration(64, 64, 4, 2)
    return Configuration(32, 32, 4, 1)


@cache
def architecture_of(device: torch.device) -> str:
    """The architecture's name for a device; the CPU, where Triton only interprets, counts as sm_80."""
    if device.type == "cuda" and torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    if device.type == "cuda":
        major, _ = torch.cuda.get_device_capability(device)
        return f"sm_{major}0"
    return "sm_80"
