"""One hand-picked launch configuration a kernel, dtype and architecture: nothing is tuned at run time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

DESCRIPTOR_ARCHITECTURES = ("sm_90", "sm_100", "sm_120")


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


# float32 products use no tensor core and only need to fit.
_PLAIN = Configuration(64, 64, 32, 4, 2)
_FORWARD = {True: Configuration(128, 256, 64, 8, 3, True), False: Configuration(128, 128, 64, 8, 3)}
_GRADIENT = {True: Configuration(128, 256, 64, 8, 3, True), False: Configuration(128, 128, 64, 8, 3)}
_PRODUCT = {True: Configuration(128, 256, 64, 8, 3, True), False: Configuration(128, 128, 64, 8, 3)}


@cache
def forward(dtype: torch.dtype, architecture: str) -> Configuration:
    """How the kernel of the log-sum-exp is launched for a dtype and architecture ("sm_80", "sm_90", "gfx942", …)."""
    return _PLAIN if dtype == torch.float32 else _FORWARD[_new(architecture)]


@cache
def gradient(dtype: torch.dtype, architecture: str) -> Configuration:
    """How the kernel of the logits' gradient is launched."""
    return _PLAIN if dtype == torch.float32 else _GRADIENT[_new(architecture)]


@cache
def product(dtype: torch.dtype, architecture: str) -> Configuration:
    """How the kernel that multiplies this gradient on is launched."""
    return _PLAIN if dtype == torch.float32 else _PRODUCT[_new(architecture)]


def _new(architecture: str) -> bool:
    return architecture.startswith(DESCRIPTOR_ARCHITECTURES)
