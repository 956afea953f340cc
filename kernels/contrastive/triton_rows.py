"""Rows of length one for the tiles on a GPU, rounded to their dtype or levelled by powers of two."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ALIGNMENT = 16  # bytes, of each row's beginning: the copy engine reads no other rows


@triton.jit
def _power_of_two(x):
    """One over the least power of two above x, exactly; that power lies between 2^-100 and 2^100."""
    exponent = tl.minimum(tl.maximum(tl.floor(tl.log2(x)) + 1.0, -100.0), 100.0).to(tl.int32)
    return ((127 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def level_rows_kernel(p_x, p_level, p_inverse, p_stretch, stride_x, stride_l, width,
                      HAS_STRETCH: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """One program: one row, brought to a length of 1/2 to 1 by a power of two, which rounds nothing, or to one."""
    row = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < width
    # [BLOCK]
    b_x = tl.load(p_x + row * stride_x + o_d, mask=m_d, other=0.0).to(tl.float32)
    peak = tl.max(tl.abs(b_x), 0)
    shrink = tl.where(peak > 0, _power_of_two(peak), 1.0)
    b_x = b_x * shrink  # no square overflows now
    b_wide = b_x.to(tl.float64)  # an error of the length is one of every similarity of the row
    length = tl.sqrt(tl.sum(b_wide * b_wide, 0))
    level = tl.where(peak > 0, _power_of_two(length.to(tl.float32)), 1.0)
    stretch = tl.where(peak > 0, 1.0 / (length * level), 0.0)
    b_level = b_x * level
    if HAS_STRETCH:
        tl.store(p_stretch + row, stretch)
    else:
        b_level = (b_level.to(tl.float64) * stretch).to(tl.float32)
    tl.store(p_level + row * stride_l + o_d, b_level.to(p_level.dtype.element_ty), mask=m_d)
    tl.store(p_inverse + row, tl.minimum(stretch.to(tl.float32) * level * shrink, 3.0e38))


def unit_rows(x: Tensor, levelled: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows of length one in x's dtype, 1 / the length each had, and None; or levelled rows and what makes them so long.

    Rounding rows of length one to 16 bits would take similarities across the margin that they are compared with:
    levelled rows have lengths of 1/2 to 1, which rounds nothing, and what makes it one comes last.
    """
    rows, width = x.shape
    step = ALIGNMENT // x.element_size()
    level = x.new_empty((rows, -(-width // step) * step))[:, :width]
    inverse = x.new_empty(rows, dtype=torch.float32)
    stretch = torch.empty_like(inverse) if levelled else None
    if rows:
        block = triton.next_power_of_2(width)
        level_rows_kernel[(rows,)](
            x, level, inverse, stretch, x.stride(0), level.stride(0), width,
            HAS_STRETCH=stretch is not None, BLOCK=block, num_warps=4 if block <= 2048 else 8,
        )  # fmt: skip
    return level, inverse, stretch
