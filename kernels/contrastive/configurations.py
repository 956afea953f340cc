"""One hand-picked launch configuration a kernel, dtype and architecture: nothing is tuned at run time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

NEWER = ("sm_90", "sm_100", "sm_120")


@dataclass(frozen=True)
class Configuration:
    """Tile sizes of a product: rows and columns of the result, steps along what is summed."""

    block_rows: int
    block_columns: int
    block_inner: int
    warps: int
    stages: int
    descriptors: bool = False  # tiles are read by the chip's copy engine, where the rows are laid out for it

    def arguments(self) -> dict[str, int]:
        """As a kernel's launch takes them, by name."""
        return {
            "BLOCK_ROWS": self.block_rows,
            "BLOCK_COLUMNS": self.block_columns,
            "BLOCK_INNER": self.block_inner,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


# float32 products use no tensor core: the tiles only need to fit. The gradient's spill 256 bytes at steps of 32.
_FLOAT32 = Configuration(64, 64, 32, 4, 2)
_FLOAT32_PRODUCT = Configuration(64, 64, 16, 4, 2)
# Where tiles of 256 columns spill: 592 to 3304 bytes under the rules that ask for more, 256 to 2304 in the products.
_NARROW = Configuration(128, 128, 64, 8, 3, descriptors=True)

# With a margin, a tile also loads what stretches its rows and columns: 128 columns spill 96 to 240 bytes.
_MARGIN = Configuration(128, 64, 64, 8, 3, descriptors=True)


@cache
def sums(dtype: torch.dtype, architecture: str, width: int, margin: bool) -> Configuration:
    """How the kernel of the softmax denominators is launched, for rows of so many columns."""
    if dtype == torch.float32:
        return _FLOAT32
    if architecture.startswith(NEWER):  # with a margin sm_100 spills 56 bytes at 256 columns
        narrow = margin and not architecture.startswith("sm_90")
        return _NARROW if narrow else Configuration(128, 256, 64, 8, 3, descriptors=True)
    if architecture.startswith("gfx"):
        return Configuration(128, 128, 32, 8, 2)
    # Rows that do not begin at whole vectors take addresses of their own: at 256 columns they spill 360 bytes.
    return Configuration(128, 256 if width % 16 == 0 else 128, 32, 8, 3)


@cache
def weights(dtype: torch.dtype, architecture: str, ruled: bool, margin: bool) -> Configuration:
    """How the kernel of the similarities' gradient is launched; ``ruled``: symmetric, or with a margin."""
    if dtype == torch.float32:
        return _FLOAT32
    if architecture.startswith(NEWER):
        if margin:
            return _MARGIN
        return _NARROW if ruled else Configuration(128, 256, 64, 8, 3, descriptors=True)
    return Configuration(128, 128, 32, 8, 2 if architecture.startswith("gfx") else 3)


@cache
def product(dtype: torch.dtype, architecture: str, width: int, margin: bool) -> Configuration:
    """How the kernel is launched that multiplies that gradient with rows of so many columns."""
    if dtype == torch.float32:
        return _FLOAT32_PRODUCT
    if architecture.startswith(NEWER):
        wide = width % 256 == 0 and not margin and not architecture.startswith("sm_100")
        return Configuration(128, 256, 64, 8, 3, descriptors=True) if wide else _NARROW
    return Configuration(128, 128, 32, 8, 2 if architecture.startswith("gfx") or width % 16 else 3)
