"""The tiles of the matrix of similarities on a GPU.

Forward, a program multiplies a tile of rows with a tile of the others over the whole width, and writes what is left of
the tile: one log-sum-exp a row. Backward, a panel of the similarities' gradient, some mebibytes in the dtype of the
rows, is made and at once multiplied with the rows on either side: three products in all, and every sum is a
program's own, so nothing is locked and the same input gives the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..launch import architecture_of, readable
from ..triton_math import LN_2, LOG2_E, dot_rows
from . import configurations
from .configurations import Configuration
from .rule import LogSum, Side, blocks
from .triton_rows import ALIGNMENT, unit_rows

# A maximum that is finite whatever the similarities never meets −inf − −inf.
LOWEST = tl.constexpr(-1.5e38)
# Row tiles that run together: their rows stay in the level-2 cache while the columns stream past.
GROUP_TILES = tl.constexpr(16)
# The panel is 64 MiB of bfloat16: wide enough to keep a large GPU busy, whatever the batch.
PANEL_ROWS = 8192
PANEL_COLUMNS = 4096
# What the tiles say of the rows, before it is joined: rows beyond it wait for another launch.
PARTIAL_BYTES = 32 * 2**20
LARGEST_TILE = 256  # rows and columns of a panel are a multiple of those of every tile


@triton.jit
def _tile_of(program, tiles_x, tiles_y):
    """Row and column tile of a program: a group of row tiles walks through all columns before the next group."""
    group = program // (GROUP_TILES * tiles_y)
    first = group * GROUP_TILES
    members = tl.minimum(tiles_x - first, GROUP_TILES)
    within = program % (GROUP_TILES * tiles_y)
    return first + within % members, within // members


@triton.jit
def _stretched(b_s, p_stretch_x, p_stretch_y, o_x, o_y, rows_x, rows_y, HAS_STRETCH: tl.constexpr):
    """Similarities of unit rows from those of the rows as they lie; the same bits with x and y exchanged."""
    if HAS_STRETCH:
        b_stretch_x = tl.load(p_stretch_x + o_x, mask=o_x < rows_x, other=0.0)
        b_stretch_y = tl.load(p_stretch_y + o_y, mask=o_y < rows_y, other=0.0)
        b_s = b_s * (b_stretch_x[:, None] * b_stretch_y[None, :])
    return b_s


@triton.jit
def _filled(b_tile, value, p_mark_x, p_mark_y, marks_x, marks_y, o_x, o_y, m_x, m_y):
    """The tile with ``value`` where row and column have a mark in common, of so many each."""
    p_mark_x += o_x.to(tl.int64) * marks_x
    p_mark_y += o_y.to(tl.int64) * marks_y
    for i in range(0, marks_x):
        b_mark_x = tl.load(p_mark_x + i, mask=m_x, other=0)[:, None]
        for j in range(0, marks_y):
            b_tile = tl.where(b_mark_x == tl.load(p_mark_y + j, mask=m_y, other=0)[None, :], value, b_tile)
    return b_tile


@triton.jit(do_not_specialize=["marks_x", "marks_y", "rows_x", "rows_y"])
def _sums_kernel(p_x, p_y, p_stretch_x, p_stretch_y, p_mark_x, p_mark_y, p_limit, p_scale, p_peak, p_rest,
                 marks_x, marks_y, stride_x, stride_y, rows_x, rows_y, SEVERAL_MARKS: tl.constexpr,
                 HAS_STRETCH: tl.constexpr, HAS_LIMIT: tl.constexpr, BOUNDED: tl.constexpr, WIDTH: tl.constexpr,
                 DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_ROWS: tl.constexpr,
                 BLOCK_COLUMNS: tl.constexpr, BLOCK_INNER: tl.constexpr):  # fmt: skip
    """One program: a tile. Writes log Σ e^z over its negatives for each of its rows, (tiles of columns, rows_x) each:
    peak and rest, see `LogSum`; no peak where e^z fits float32 as it is."""
    tiles_x = tl.cdiv(rows_x, BLOCK_ROWS)
    tile_x, tile_y = _tile_of(tl.program_id(0), tiles_x, tl.cdiv(rows_y, BLOCK_COLUMNS))
    first_x = tile_x * BLOCK_ROWS
    first_y = tile_y * BLOCK_COLUMNS
    # [BLOCK_ROWS, BLOCK_COLUMNS]
    b_s = dot_rows(p_x, p_y, stride_x, stride_y, first_x, first_y, rows_x, rows_y, WIDTH, DESCRIPTORS, PRECISION,
                   BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_INNER)  # fmt: skip
    o_x = first_x + tl.arange(0, BLOCK_ROWS)
    o_y = first_y + tl.arange(0, BLOCK_COLUMNS)
    m_x = o_x < rows_x
    m_y = o_y < rows_y
    b_s = _stretched(b_s, p_stretch_x, p_stretch_y, o_x, o_y, rows_x, rows_y, HAS_STRETCH)
    if SEVERAL_MARKS:
        b_s = _filled(b_s, float("-inf"), p_mark_x, p_mark_y, marks_x, marks_y, o_x, o_y, m_x, m_y)
        m_negative = m_y[None, :]
    else:
        b_mark_x = tl.load(p_mark_x + o_x, mask=m_x, other=0)
        b_mark_y = tl.load(p_mark_y + o_y, mask=m_y, other=0)
        m_negative = (b_mark_x[:, None] != b_mark_y[None, :]) & m_y[None, :]
    if HAS_LIMIT:
        m_negative = m_negative & (b_s <= tl.load(p_limit + o_x, mask=m_x, other=0.0)[:, None])
    scale = tl.load(p_scale)
    o_part = tile_y.to(tl.int64) * rows_x + o_x
    if BOUNDED:
        # [BLOCK_ROWS]
        b_sum = tl.sum(tl.where(m_negative, tl.exp2(b_s * (scale * LOG2_E)), 0.0), 1)
    else:
        b_z = tl.where(m_negative, b_s * scale, float("-inf"))
        b_peak = tl.maximum(tl.max(b_z, 1), LOWEST)
        # The very expression of the backward pass: weights that were rounded otherwise would not add up to one.
        b_sum = tl.sum(tl.where(m_negative, tl.exp2(tl.fma(b_s, scale, -b_peak[:, None]) * LOG2_E), 0.0), 1)
        tl.store(p_peak + o_part, b_peak, mask=m_x)
    tl.store(p_rest + o_part, tl.log2(b_sum) * LN_2, mask=m_x)


@triton.jit
def _weight(b_s, scale, b_peak, b_rest, b_weight, b_limit, HAS_LIMIT: tl.constexpr):
    """weight · e^(z − lse), 0 above the limit; vectors broadcast along the softmax. → [BLOCK_ROWS, BLOCK_COLUMNS]"""
    b_h = b_weight * tl.exp2((tl.fma(b_s, scale, -b_peak) - b_rest) * LOG2_E)
    if HAS_LIMIT:
        b_h = tl.where(b_s <= b_limit, b_h, 0.0)
    return b_h


@triton.jit(do_not_specialize=["marks_x", "marks_y", "rows_x", "rows_y", "number_y"])
def _weights_kernel(p_x, p_y, p_h, p_stretch_x, p_stretch_y, p_mark_x, p_mark_y, p_peak_x, p_peak_y, p_rest_x,
                    p_rest_y, p_weight_x, p_weight_y, p_limit_x, p_limit_y, p_positive, p_gradient, p_scale,
                    marks_x, marks_y, stride_x, stride_y, stride_h, rows_x, rows_y, number_y,
                    SEVERAL_MARKS: tl.constexpr, HAS_STRETCH: tl.constexpr, HAS_LIMIT_X: tl.constexpr,
                    HAS_LIMIT_Y: tl.constexpr, HAS_COLUMNS: tl.constexpr, HAS_POSITIVE: tl.constexpr,
                    WIDTH: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_ROWS: tl.constexpr,
                    BLOCK_COLUMNS: tl.constexpr, BLOCK_INNER: tl.constexpr):  # fmt: skip
    """One program: a tile of H, the gradient of the similarities (over the scale), into the panel, times what stretches
    its row and its column; zeros past the end, so that nothing that reads whole tiles of the panel needs a mask."""
    tile_x, tile_y = _tile_of(tl.program_id(0), tl.cdiv(rows_x, BLOCK_ROWS), tl.cdiv(rows_y, BLOCK_COLUMNS))
    first_x = tile_x * BLOCK_ROWS
    first_y = tile_y * BLOCK_COLUMNS
    # [BLOCK_ROWS, BLOCK_COLUMNS]
    b_s = dot_rows(p_x, p_y, stride_x, stride_y, first_x, first_y, rows_x, rows_y, WIDTH, DESCRIPTORS, PRECISION,
                   BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_INNER)  # fmt: skip
    o_x = first_x + tl.arange(0, BLOCK_ROWS)
    o_y = first_y + tl.arange(0, BLOCK_COLUMNS)
    m_x = o_x < rows_x
    m_y = o_y < rows_y
    b_s = _stretched(b_s, p_stretch_x, p_stretch_y, o_x, o_y, rows_x, rows_y, HAS_STRETCH)
    scale = tl.load(p_scale)
    b_limit = 0.0
    if HAS_LIMIT_X:
        b_limit = tl.load(p_limit_x + o_x, mask=m_x, other=0.0)[:, None]
    b_peak = tl.load(p_peak_x + o_x, mask=m_x, other=0.0)[:, None]
    b_rest = tl.load(p_rest_x + o_x, mask=m_x, other=float("inf"))[:, None]
    b_weight = tl.load(p_weight_x + o_x, mask=m_x, other=0.0)[:, None]
    b_h = _weight(b_s, scale, b_peak, b_rest, b_weight, b_limit, HAS_LIMIT_X)
    if HAS_COLUMNS:
        if HAS_LIMIT_Y:
            b_limit = tl.load(p_limit_y + o_y, mask=m_y, other=0.0)[None, :]
        b_peak = tl.load(p_peak_y + o_y, mask=m_y, other=0.0)[None, :]
        b_rest = tl.load(p_rest_y + o_y, mask=m_y, other=float("inf"))[None, :]
        b_weight = tl.load(p_weight_y + o_y, mask=m_y, other=0.0)[None, :]
        b_h += _weight(b_s, scale, b_peak, b_rest, b_weight, b_limit, HAS_LIMIT_Y)
    if SEVERAL_MARKS:
        b_h = _filled(b_h, 0.0, p_mark_x, p_mark_y, marks_x, marks_y, o_x, o_y, m_x, m_y)
        b_h = tl.where(m_x[:, None] & m_y[None, :], b_h, 0.0)
    else:
        b_mark_x = tl.load(p_mark_x + o_x, mask=m_x, other=0)
        b_mark_y = tl.load(p_mark_y + o_y, mask=m_y, other=0)
        b_h = tl.where((b_mark_x[:, None] != b_mark_y[None, :]) & m_x[:, None] & m_y[None, :], b_h, 0.0)
    if HAS_POSITIVE:
        b_positive = tl.load(p_positive + o_x, mask=m_x, other=-1)
        b_gradient = tl.load(p_gradient + o_x, mask=m_x, other=0.0)
        b_h = tl.where(b_positive[:, None] == (number_y + o_y)[None, :], b_gradient[:, None], b_h)
    b_h = _stretched(b_h, p_stretch_x, p_stretch_y, o_x, o_y, rows_x, rows_y, HAS_STRETCH)
    _store_tile(p_h, stride_h, first_x, first_y, b_h)


@triton.jit
def _store_tile(p_matrix, stride, first, first_column, b_tile):
    """Write a whole tile: the base in int64, offsets within it in int32."""
    o_row = tl.arange(0, b_tile.shape[0])
    o_column = tl.arange(0, b_tile.shape[1])
    p_tile = p_matrix + first.to(tl.int64) * stride + first_column + (o_row * stride)[:, None] + o_column[None, :]
    tl.store(p_tile, b_tile.to(p_matrix.dtype.element_ty))


@triton.jit(do_not_specialize=["rows", "inner_rows"])
def _product_kernel(p_h, p_v, p_into, p_stretch, stride_h, stride_v, stride_i, rows, inner_rows,
                    HAS_STRETCH: tl.constexpr, TRANSPOSED: tl.constexpr, WIDTH: tl.constexpr,
                    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_ROWS: tl.constexpr,
                    BLOCK_COLUMNS: tl.constexpr, BLOCK_INNER: tl.constexpr):  # fmt: skip
    """One program: a tile of into (rows, WIDTH) += h (rows, inner_rows) · v (inner_rows, WIDTH), or of hᵀ as stored,
    each row over what stretches it.

    h is a panel: whole tiles, with zeros past its end.
    """
    tile_x, tile_d = _tile_of(tl.program_id(0), tl.cdiv(rows, BLOCK_ROWS), tl.cdiv(WIDTH, BLOCK_COLUMNS))
    first = tile_x * BLOCK_ROWS
    first_d = tile_d * BLOCK_COLUMNS
    o_x = tl.arange(0, BLOCK_ROWS)
    o_d = tl.arange(0, BLOCK_COLUMNS)
    o_k = tl.arange(0, BLOCK_INNER)
    m_into = (o_x < rows - first)[:, None] & (o_d < WIDTH - first_d)[None, :]
    p_into += first.to(tl.int64) * stride_i + first_d
    # [BLOCK_ROWS, BLOCK_COLUMNS]
    b_sum = tl.load(p_into + (o_x * stride_i)[:, None] + o_d[None, :], mask=m_into, other=0.0)
    if HAS_STRETCH:
        b_stretch = tl.load(p_stretch + first + o_x, mask=o_x < rows - first, other=0.0)
        b_sum = b_sum * b_stretch[:, None]
    for inner in range(0, inner_rows, BLOCK_INNER):
        step = inner + tl.full((), 0, tl.int32)
        if DESCRIPTORS:
            b_v = p_v.load([inner, first_d])
        else:
            o_row = tl.minimum(o_k, inner_rows - 1 - step)  # past the end any row will do: h is zero there
            p_tile = p_v + step.to(tl.int64) * stride_v + first_d + (o_row * stride_v)[:, None] + o_d[None, :]
            if WIDTH % BLOCK_COLUMNS == 0:
                b_v = tl.load(p_tile)
            else:
                b_v = tl.load(p_tile, mask=(o_d < WIDTH - first_d)[None, :], other=0.0)
        if TRANSPOSED:
            if DESCRIPTORS:
                b_h = p_h.load([inner, first])
            else:
                p_panel = p_h + step.to(tl.int64) * stride_h + first
                b_h = tl.load(p_panel + (o_k * stride_h)[:, None] + o_x[None, :])
            b_h = tl.trans(b_h)
        else:
            if DESCRIPTORS:
                b_h = p_h.load([first, inner])
            else:
                p_panel = p_h + first.to(tl.int64) * stride_h + inner
                b_h = tl.load(p_panel + (o_x * stride_h)[:, None] + o_k[None, :])
        b_sum = tl.dot(b_h, b_v, b_sum, input_precision=PRECISION)
    if HAS_STRETCH:
        b_stretch = tl.load(p_stretch + first + o_x, mask=o_x < rows - first, other=0.0)
        b_sum = b_sum * tl.where(b_stretch > 0, 1.0 / b_stretch, 0.0)[:, None]
    tl.store(p_into + (o_x * stride_i)[:, None] + o_d[None, :], b_sum, mask=m_into)


def prepared(x: Tensor, cosine: bool, compared: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As `blocked.prepared`, of length one already, or levelled where they are ``compared`` in 16 bits."""
    x = readable(x)
    return unit_rows(x, compared and x.element_size() == 2) if cosine else (x, None, None)


def negative_sums(x: Side, y: Side, scale: Tensor, columns: bool, bounded: bool) -> tuple[LogSum, LogSum | None]:
    """As `blocked.negative_sums`; the other direction is a pass of its own."""
    return _row_sums(x, y, scale, bounded), _row_sums(y, x, scale, bounded) if columns else None


def _row_sums(x: Side, y: Side, scale: Tensor, bounded: bool) -> LogSum:
    config = configurations.sums(x.rows.dtype, architecture_of(x.rows.device), x.rows.shape[1], x.limit is not None)
    tiles = triton.cdiv(y.count, config.block_columns)
    step = max(1, PARTIAL_BYTES // (8 * tiles * config.block_rows)) * config.block_rows
    sums = []
    for rows in blocks(x.count, step):
        part = x.part(rows)
        rests = x.rows.new_empty((tiles, part.count), dtype=torch.float32)
        peaks = torch.zeros_like(rests[:1]) if bounded else torch.empty_like(rests)
        arguments = sums_arguments(part, y, scale, peaks, rests, bounded, config)
        _sums_kernel[(tiles * triton.cdiv(part.count, config.block_rows),)](**arguments)
        sums.append(LogSum.joined(peaks, rests))
    return LogSum(*(torch.cat(parts) for parts in zip(*sums, strict=True)))


def add_gradients(
    x: Side,
    y: Side,
    scale: Tensor,
    positives: tuple[Tensor, Tensor] | None,
    into_x: Tensor | None,
    into_y: Tensor | None,
) -> None:
    """As `blocked.add_gradients`, a panel at a time."""
    architecture = architecture_of(x.rows.device)
    config = configurations.weights(x.rows.dtype, architecture, is_ruled(x, y), x.limit is not None)
    panel = x.rows.new_empty(tuple(_whole_tiles(n) for n in (x.count, min(PANEL_COLUMNS, y.count))))
    for block in blocks(y.count, PANEL_COLUMNS):
        part = y.part(block)
        h = panel[:, : _whole_tiles(part.count)]
        arguments = weights_arguments(x, part, h, scale, positives, block.start, config)
        tiles = triton.cdiv(x.count, config.block_rows) * triton.cdiv(part.count, config.block_columns)
        _weights_kernel[(tiles,)](**arguments)
        if into_x is not None:
            _add_product(h, part.rows, into_x, x.stretch, False)
        if into_y is not None:
            _add_product(h, x.rows, into_y[block], part.stretch, True)


def is_ruled(x: Side, y: Side) -> bool:
    """Whether the gradient of a similarity has more terms than the plain loss of x's rows."""
    return y.weight is not None or x.limit is not None or y.limit is not None


def _whole_tiles(count: int) -> int:
    return -(-count // LARGEST_TILE) * LARGEST_TILE


def _add_product(h: Tensor, v: Tensor, into: Tensor, stretch: Tensor | None, transposed: bool) -> None:
    """into += h·v, or hᵀ·v, each row over its ``stretch``."""
    config = configurations.product(h.dtype, architecture_of(h.device), v.shape[1], stretch is not None)
    tiles = triton.cdiv(into.shape[0], config.block_rows) * triton.cdiv(into.shape[1], config.block_columns)
    _product_kernel[(tiles,)](**product_arguments(h, v, into, stretch, transposed, config))


def sums_arguments(
    x: Side, y: Side, scale: Tensor, peaks: Tensor, rests: Tensor, bounded: bool, config: Configuration
) -> dict[str, Any]:
    """What `_sums_kernel` is launched with, by name; the ahead-of-time report compiles the same."""
    return {
        **_pair_arguments(x, y, config), "p_limit": x.limit, "p_scale": scale,
        "p_peak": peaks, "p_rest": rests,
        "HAS_LIMIT": x.limit is not None, "BOUNDED": bounded,
    }  # fmt: skip


def weights_arguments(
    x: Side,
    y: Side,
    h: Tensor,
    scale: Tensor,
    positives: tuple[Tensor, Tensor] | None,
    number_y: int,
    config: Configuration,
) -> dict[str, Any]:
    """What `_weights_kernel` is launched with, by name; the rows of y are numbered from ``number_y``."""
    positive, gradient = positives or (None, None)
    return {
        **_pair_arguments(x, y, config), "p_h": h, "stride_h": h.stride(0), "number_y": number_y, "p_scale": scale,
        "p_peak_x": x.peak, "p_peak_y": y.peak, "p_rest_x": x.rest, "p_rest_y": y.rest,
        "p_weight_x": x.weight, "p_weight_y": y.weight,
        "p_limit_x": x.limit, "p_limit_y": y.limit, "p_positive": positive, "p_gradient": gradient,
        "HAS_LIMIT_X": x.limit is not None, "HAS_LIMIT_Y": y.limit is not None, "HAS_COLUMNS": y.weight is not None,
        "HAS_POSITIVE": positive is not None,
    }  # fmt: skip


def product_arguments(
    h: Tensor, v: Tensor, into: Tensor, stretch: Tensor | None, transposed: bool, config: Configuration
) -> dict[str, Any]:
    """What `_product_kernel` is launched with, by name."""
    h_block = (config.block_inner, config.block_rows) if transposed else (config.block_rows, config.block_inner)
    v_block = (config.block_inner, config.block_columns)
    descriptors = config.descriptors and _copyable(h, v)
    return {
        "p_h": _readable(h, h_block, descriptors), "p_v": _readable(v, v_block, descriptors),
        "p_into": into, "p_stretch": stretch, "HAS_STRETCH": stretch is not None,
        "stride_h": h.stride(0), "stride_v": v.stride(0), "stride_i": into.stride(0),
        "rows": into.shape[0], "inner_rows": v.shape[0], "TRANSPOSED": transposed, "WIDTH": v.shape[1],
        "DESCRIPTORS": descriptors, "PRECISION": _precision(h), **config.arguments(),
    }  # fmt: skip


def _pair_arguments(x: Side, y: Side, config: Configuration) -> dict[str, Any]:
    descriptors = config.descriptors and _copyable(x.rows, y.rows)
    return {
        "p_x": _readable(x.rows, (config.block_rows, config.block_inner), descriptors),
        "p_y": _readable(y.rows, (config.block_columns, config.block_inner), descriptors),
        "p_stretch_x": x.stretch, "p_stretch_y": y.stretch, "HAS_STRETCH": x.stretch is not None,
        "p_mark_x": x.marks, "p_mark_y": y.marks, "marks_x": x.marks.shape[1], "marks_y": y.marks.shape[1],
        "SEVERAL_MARKS": x.marks.shape[1] > 1 or y.marks.shape[1] > 1,
        "stride_x": x.rows.stride(0), "stride_y": y.rows.stride(0),
        "rows_x": x.count, "rows_y": y.count, "WIDTH": x.rows.shape[1], "DESCRIPTORS": descriptors,
        "PRECISION": _precision(x.rows), **config.arguments(),
    }  # fmt: skip


def _readable(x: Tensor, block: tuple[int, int], descriptors: bool) -> Tensor | TensorDescriptor:
    return TensorDescriptor.from_tensor(x, list(block)) if descriptors else x


def _copyable(*tensors: Tensor) -> bool:
    """Whether the copy engine can read these: rows that begin at multiples of 16 bytes."""
    return all(x.data_ptr() % ALIGNMENT == 0 and x.stride(0) * x.element_size() % ALIGNMENT == 0 for x in tensors)


def _precision(x: Tensor) -> str:
    """float32 products follow PyTorch's own switch: exact unless the user allowed TF32."""
    return "tf32" if x.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"
