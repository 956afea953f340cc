"""One hand-picked launch configuration a kernel, head size, dtype and architecture: nothing is tuned at run time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class Configuration:
    """How a kernel is launched.

    Attributes:
        block_q, block_k: tile sizes in rows.
        warps: of a program.
        stages: of the software pipeline.
        described: the loop copies its tiles by tensor descriptor (TMA) rather than by pointers.
        split: a head size that is no power of two is split into two blocks of columns (80 = 64 + 16), where that
            wastes less than padding it to one (128).
    """

    block_q: int
    block_k: int
    warps: int
    stages: int
    described: bool = False
    split: bool = False

    def widths(self, head_dim: int) -> tuple[int, int]:
        """The columns of a tile's one or two blocks (0: one), each a power of two that a matrix instruction takes."""
        padded = block_d(head_dim)
        first = 1 << (head_dim.bit_length() - 1)
        rest = block_d(head_dim - first) if head_dim > first else 0
        return (first, rest) if self.split and first >= 16 and first + rest < padded else (padded, 0)

    def arguments(self, head_dim: int) -> dict[str, int]:
        """As a kernel's launch takes them, by name."""
        width, rest = self.widths(head_dim)
        return {
            "BLOCK_Q": self.block_q,
            "BLOCK_K": self.block_k,
            "BLOCK_D": width,
            "BLOCK_E": rest,
            "DESCRIBED": self.described,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


def block_d(head_dim: int) -> int:
    """The head size as one block of columns: a power of two that a matrix instruction takes."""
    return max(16, 1 << (head_dim - 1).bit_length())


# Chosen from what `python -m benchmarks.codegen` finds in the machine code, without timings: no (or the fewest) spilled
# registers first, then the fewest instructions a FLOP in the inner loop (wi/MF, lower is better). Keys are
# (tile width up to, from sm_90 on); the comments give wi/MF of the choice, then of what lost and why.
_FORWARD = {
    (64, True): Configuration(128, 128, 8, 2, described=True),  # 919
    (128, True): Configuration(128, 128, 8, 2, described=True),  # 503
    # 1156; 128×64 with 4 warps: 1240 and 16 bytes spilled.
    (64, False): Configuration(128, 128, 8, 2),
    # 963 and 56 bytes spilled; 128×128: 869 and 144 bytes; 64×64 with 4 warps: 1354 and 12 bytes.
    (128, False): Configuration(128, 64, 8, 2),
}
_BACKWARD_KEYS = {
    (64, True): Configuration(64, 64, 4, 2, described=True),  # 662
    (128, True): Configuration(64, 64, 4, 2, described=True),  # 374
    # 877; 64×64: 870 and 64 bytes spilled.
    (64, False): Configuration(32, 128, 8, 2),
    # 759 and 60 bytes spilled; 64×64 with 4 warps: 677 and 696 bytes.
    (128, False): Configuration(32, 64, 4, 2),
}
_BACKWARD_QUERIES = {
    (64, True): Configuration(128, 128, 8, 2, described=True),  # 567
    (128, True): Configuration(64, 64, 4, 2, described=True),  # 404
    # 860; 128×64 with 4 warps: 846 and 236 bytes spilled.
    (64, False): Configuration(128, 64, 8, 2),
    # 687; 128×64: 662 and 68 bytes spilled; 64×64 with 4 warps: 745.
    (128, False): Configuration(128, 32, 8, 2),
}
# Tiles wider than 128 and float32, whose products use no tensor core, only need to fit.
_SMALL = Configuration(32, 32, 4, 1)
_FORWARD_WIDE = Configuration(64, 32, 4, 2)


@cache
def forward(head_dim: int, dtype: torch.dtype, architecture: str, describable: bool) -> Configuration:
    """How the forward kernel is launched for a head size, dtype and architecture ("sm_80", "sm_90", "gfx942", …).

    ``describable``: whether the tensors that its loop reads can be copied by descriptor.
    """
    width = block_d(head_dim)
    if dtype == torch.float32:
        return _FORWARD_WIDE if width <= 128 else _SMALL
    return _FORWARD_WIDE if width > 128 else _FORWARD[_key(width, architecture, describable)]


@cache
def backward_keys(head_dim: int, dtype: torch.dtype, architecture: str, describable: bool) -> Configuration:
    """How the dK and dV kernel is launched."""
    width = block_d(head_dim)
    return _SMALL if dtype == torch.float32 or width > 128 else _BACKWARD_KEYS[_key(width, architecture, describable)]


@cache
def backward_queries(head_dim: int, dtype: torch.dtype, architecture: str, describable: bool) -> Configuration:
    """How the dQ kernel is launched."""
    width = block_d(head_dim)
    return (
        _SMALL if dtype == torch.float32 or width > 128 else _BACKWARD_QUERIES[_key(width, architecture, describable)]
    )


def _key(width: int, architecture: str, describable: bool) -> tuple[int, bool]:
    return 64 if width <= 64 else 128, describable and architecture.startswith(("sm_90", "sm_100", "sm_120"))


@cache
def architecture_of(device: torch.device) -> str:
    """The architecture's name for a device; the CPU, where Triton only interprets, counts as sm_80."""
    if device.type == "cuda" and torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    if device.type == "cuda":
        major, _ = torch.cuda.get_device_capability(device)
        return f"sm_{major}0"
    return "sm_80"
