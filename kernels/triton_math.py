"""Device functions that kernels of several operations share."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E, LN_2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
# A point that float32 holds exactly, as it does (to 1e-9) its tanh.
MIDDLE = tl.constexpr(0.783203125)
TANH_MIDDLE = tl.constexpr(0.6545413742720325)


@triton.jit
def tanh(x, PRECISE: tl.constexpr):
    """tanh from exp2: Triton's portable language has none. Below 1.2 the formula cancels, which float32 would show."""
    size = tl.abs(x)
    b_tanh = 1.0 - 2.0 / (tl.exp2(size * (2.0 * LOG2_E)) + 1.0)
    if PRECISE:
        # The Taylor series to h¹³ on |h| < 0.4, where its remainder is under 4e-9 of the value; 0.4 … 1.2 are reached
        # from the middle by the addition theorem.
        b_h = tl.where(size < 0.4, size, size - MIDDLE)
        square = b_h * b_h
        b_series = square * (21844.0 / 6081075.0) - 1382.0 / 155925.0
        b_series = b_series * square + 62.0 / 2835.0
        b_series = b_series * square - 17.0 / 315.0
        b_series = b_series * square + 2.0 / 15.0
        b_series = b_series * square - 1.0 / 3.0
        b_series = b_series * square * b_h + b_h
        b_middle = TANH_MIDDLE + (1.0 - TANH_MIDDLE * TANH_MIDDLE) * b_series / (1.0 + TANH_MIDDLE * b_series)
        b_tanh = tl.where(size < 1.2, tl.where(size < 0.4, b_series, b_middle), b_tanh)
    return tl.where(x < 0, -b_tanh, b_tanh)


@triton.jit
def dot_rows(p_x, p_y, stride_x, stride_y, first_x, first_y, rows_x, rows_y, WIDTH: tl.constexpr,
             DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
             BLOCK_INNER: tl.constexpr):  # fmt: skip
    """x·yᵀ in float32 of rows first_x … and first_y …, over their whole width. → [BLOCK_ROWS, BLOCK_COLUMNS]"""
    b_product = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    for inner in range(0, WIDTH, BLOCK_INNER):
        # [BLOCK_ROWS, BLOCK_INNER]
        b_x = _rows_tile(p_x, stride_x, first_x, rows_x, inner, BLOCK_ROWS, BLOCK_INNER, WIDTH, DESCRIPTORS)
        # [BLOCK_COLUMNS, BLOCK_INNER]
        b_y = _rows_tile(p_y, stride_y, first_y, rows_y, inner, BLOCK_COLUMNS, BLOCK_INNER, WIDTH, DESCRIPTORS)
        b_product = tl.dot(b_x, tl.trans(b_y), b_product, input_precision=PRECISION)
    return b_product


@triton.jit
def _rows_tile(p_rows, stride, first, count, inner, BLOCK: tl.constexpr, BLOCK_INNER: tl.constexpr,
               WIDTH: tl.constexpr, DESCRIPTORS: tl.constexpr):  # fmt: skip
    """Rows first … and elements inner …; past the end the last row again, or zeros. → [BLOCK, BLOCK_INNER]"""
    if DESCRIPTORS:
        b_tile = p_rows.load([first, inner])
    else:
        # The tile's base in int64, offsets within it in int32: fewer registers than pointers carried through the loop.
        o_row = tl.minimum(tl.arange(0, BLOCK), count - 1 - first)
        o_inner = tl.arange(0, BLOCK_INNER)
        p_tile = p_rows + first.to(tl.int64) * stride + inner + (o_row * stride)[:, None] + o_inner[None, :]
        if WIDTH % BLOCK_INNER == 0:
            b_tile = tl.load(p_tile)
        else:
            b_tile = tl.load(p_tile, mask=(o_inner < WIDTH - inner)[None, :], other=0.0)
    return b_tile
