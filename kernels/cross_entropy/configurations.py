"""One hand-picked launch configuration a kernel, dtype and architecture: nothing is tuned at run time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch

DESCRIPTOR_ARCHITECTURES = ("sm_90", "sm_100", "sm_120")
UNALIGNED = "unaligned"  # instead of an architecture: rows that do not start at multiples of 16 bytes


@dataclass(frozen=True)
class Configuration:
    """A tile of the result (rows × columns), how much of the inner dimension a step takes, warps and stages.

    For the logits and their gradient rows are tokens and columns entries of the vocabulary; for the products rows are
    tokens or entries and columns elements of a hidden state. ``descriptors``: tiles are copied by the chip's tensor
    memory accelerator.
    """

    block_rows: int
    block_columns: int
    block_inner: int
    warps: int
    stages: int
    descriptors: bool = False

    def arguments(self) -> dict[str, int | bool]:
        """As a kernel's launch takes them, by name."""
        return {
            "BLOCK_ROWS": self.block_rows,
            "BLOCK_COLUMNS": self.block_columns,
            "BLOCK_INNER": self.block_inner,
            "DESCRIPTORS": self.descriptors,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


# Chosen from what `python -m benchmarks.codegen` finds in the machine code, without timings: no spilled registers
# first, then the fewest instructions a FLOP in the inner loop (wi/MF, lower is better); the comments give wi/MF of the
# choice, then of what lost and why. float32 products use no tensor core and only need to fit.
_PLAIN = Configuration(64, 64, 32, 4, 2)
# Rows that are not aligned are copied element by element, which larger tiles have no registers for.
_UNALIGNED = Configuration(64, 64, 32, 4, 1)
# gfx942 has 64 KiB of local memory.
_AMD = Configuration(128, 128, 32, 8, 2)
# With descriptors. Forward and gradient 105, products 104 and 113; 64 elements and 3 stages: 170 to 183; 256×128: 127.
_DEEP = Configuration(128, 256, 128, 8, 2, True)
# The same for widths that whole steps of 128 do not fill.
_SHALLOW = Configuration(128, 256, 64, 8, 3, True)
# With pointers. 450; 256×128: 467; steps of 32: 511; 128×128 with 4 warps: 561.
_FORWARD = Configuration(128, 256, 64, 8, 3)
# 496; every option at once 542.
_GRADIENT = Configuration(128, 256, 32, 8, 3)
# Gradient of the weight 664. With a mask in every step 721, and so: steps of 64: 4160 and 12816 bytes spilled; 128×128
# with steps of 64: 912.
_PRODUCT_WEIGHT = Configuration(128, 256, 32, 8, 3)
# Gradient of the hidden states, which reads what it adds to, 523. With a mask in every step 580, and so: 2 stages: 534;
# steps of 32: 744.
_PRODUCT_HIDDEN = Configuration(128, 256, 64, 8, 3)


@cache
def forward(dtype: torch.dtype, width: int, architecture: str) -> Configuration:
    """How the kernel of the log-sum-exp is launched for an architecture ("sm_80", "sm_90", "gfx942", …)."""
    return _shared(dtype, width, architecture) or _FORWARD


@cache
def gradient(dtype: torch.dtype, width: int, architecture: str) -> Configuration:
    """How the kernel of the logits' gradient is launched."""
    config = _shared(dtype, width, architecture) or _GRADIENT
    if config.descriptors and architecture.startswith("sm_100"):
        # Logits leave tensor memory all at once: with every option 256 columns spill 4232 bytes, 128 none.
        return replace(config, block_columns=128)
    return config


@cache
def product(dtype: torch.dtype, width: int, architecture: str, transposed: bool) -> Configuration:
    """How the kernel that multiplies this gradient on is launched; ``transposed``: towards the weight's gradient."""
    return _shared(dtype, width, architecture) or (_PRODUCT_WEIGHT if transposed else _PRODUCT_HIDDEN)


def _shared(dtype: torch.dtype, width: int, architecture: str) -> Configuration | None:
    if dtype == torch.float32:
        return _PLAIN
    if architecture == UNALIGNED:
        return _UNALIGNED
    if architecture.startswith("gfx"):
        return _AMD
    if architecture.startswith(DESCRIPTOR_ARCHITECTURES):
        return _DEEP if width % _DEEP.block_inner == 0 else _SHALLOW
    return None
