"""Gradients of the loss on a GPU: deterministic, without locks or atomics, in bounded memory.

The logits' gradient is made for a block of the vocabulary at a time, in the operands' dtype, and multiplied on from
there: with the rows it gives the weight's gradient, whose part for this block is complete and written once; with the
block of the weight it adds to the hidden states' gradient, held in float32. One kernel makes the logits again and turns
them into their gradient; the other multiplies. A kernel that did both would hold a tile of either gradient and make
the logits again for each, or share the gradients between programs, under locks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import readable
from ..triton_math import LOG2_E, tanh
from . import configurations
from .configurations import Configuration
from .rule import Gradients, Problem
from .triton import _logits_tile, architecture_for, logits_arguments, operand, precision

# The logits' gradient held at once.
BLOCK_BYTES = 64 * 1024 * 1024
# Few rows of narrow hidden states make few programs: then the vocabulary is split over more of them.
PROGRAMS = 264
MOST_SPLITS = 8


@triton.jit(do_not_specialize=["rows", "entries"])
def _gradient_kernel(p_hidden, p_weight, p_bias, p_labels, p_lse, p_factor, p_grad, p_out, p_sums, stride_h, stride_w,
                     stride_out, rows, entries, softcap, smoothed, kept,
                     HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SUMS: tl.constexpr, FLOAT32: tl.constexpr,
                     DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr, WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr,
                     BLOCK_COLUMNS: tl.constexpr, BLOCK_INNER: tl.constexpr):  # fmt: skip
    """One program: a tile of the logits' gradient, zeros past the ends. Writes out, and its sums over a tile's rows."""
    row_tiles = tl.cdiv(rows, BLOCK_ROWS)
    row_tile = tl.program_id(0) % row_tiles
    first_row = row_tile * BLOCK_ROWS
    first_entry = tl.program_id(0) // row_tiles * BLOCK_COLUMNS
    # [BLOCK_ROWS, BLOCK_COLUMNS]
    b_x = _logits_tile(p_hidden, p_weight, p_bias, stride_h, stride_w, first_row, first_entry, rows, entries, softcap,
                       HAS_BIAS, False, FLOAT32, DESCRIPTORS, PRECISION, WIDTH, BLOCK_ROWS, BLOCK_COLUMNS,
                       BLOCK_INNER)  # fmt: skip
    o_row = first_row + tl.arange(0, BLOCK_ROWS)
    m_row = o_row < rows
    # [BLOCK_ROWS]; rows past the end have weight zero.
    b_lse = tl.load(p_lse + o_row, mask=m_row, other=float("inf"))
    b_factor = tl.load(p_factor + o_row, mask=m_row, other=0.0)
    b_grad = tl.load(p_grad + o_row, mask=m_row, other=0.0)
    b_label = tl.load(p_labels + o_row, mask=m_row, other=-1) - first_entry
    p_tile = p_out + first_row.to(tl.int64) * stride_out + first_entry
    first_sum = row_tile * stride_out + first_entry
    left = entries - first_entry
    if BLOCK_COLUMNS < 256:
        _soften(b_x, b_lse, b_factor, b_grad, b_label, p_tile, p_sums, first_sum, stride_out, left, softcap, smoothed,
                kept, HAS_SOFTCAP, HAS_SUMS, FLOAT32)  # fmt: skip
    else:
        HALF: tl.constexpr = BLOCK_COLUMNS // 2
        b_first, b_second = halves(b_x)
        _soften(b_first, b_lse, b_factor, b_grad, b_label, p_tile, p_sums, first_sum, stride_out, left, softcap,
                smoothed, kept, HAS_SOFTCAP, HAS_SUMS, FLOAT32)  # fmt: skip
        _soften(b_second, b_lse, b_factor, b_grad, b_label - HALF, p_tile + HALF, p_sums, first_sum + HALF, stride_out,
                left - HALF, softcap, smoothed, kept, HAS_SOFTCAP, HAS_SUMS, FLOAT32)  # fmt: skip


@triton.jit
def halves(b_tile):
    """The left and the right half of a tile (rows, columns): worked on in turn they take half the registers."""
    return tl.split(tl.permute(tl.reshape(b_tile, (b_tile.shape[0], 2, b_tile.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _soften(b_x, b_lse, b_factor, b_grad, b_label, p_tile, p_sums, first_sum, stride_out, left, softcap, smoothed, kept,
            HAS_SOFTCAP: tl.constexpr, HAS_SUMS: tl.constexpr, FLOAT32: tl.constexpr):  # fmt: skip
    """Write the gradient of logits b_x (rows, columns), of which ``left`` columns exist; labels count from the first.
    The softcap comes here and not before: the registers hold its slope for a part of the tile."""
    o_column = tl.arange(0, b_x.shape[1])
    if HAS_SOFTCAP:
        b_tanh = tanh(b_x / softcap, FLOAT32)
        b_x = softcap * b_tanh
    b_dx = tl.exp2((b_x - b_lse[:, None]) * LOG2_E) * b_factor[:, None] - (smoothed * b_grad)[:, None]
    b_dx -= tl.where(o_column[None, :] == b_label[:, None], (kept * b_grad)[:, None], 0.0)
    if HAS_SOFTCAP:
        b_dx *= 1.0 - b_tanh * b_tanh
    b_dx = tl.where((o_column < left)[None, :], b_dx, 0.0)
    o_tile = tl.arange(0, b_x.shape[0])[:, None] * stride_out + o_column[None, :]
    tl.store(p_tile + o_tile, b_dx.to(p_tile.dtype.element_ty))
    if HAS_SUMS:
        tl.store(p_sums + first_sum + o_column, tl.sum(b_dx, 0))


@triton.jit
def _columns_tile(p_rows, stride, first, count, column, MASKED: tl.constexpr, BLOCK_INNER: tl.constexpr,
                  BLOCK: tl.constexpr, WIDTH: tl.constexpr, DESCRIPTORS: tl.constexpr):  # fmt: skip
    """Rows first … and elements column …; past the last row, which by pointers takes MASKED, and past the last element
    zeros. → [BLOCK_INNER, BLOCK]"""
    if DESCRIPTORS:
        b_tile = p_rows.load([first, column])
    else:
        o_row = tl.arange(0, BLOCK_INNER)
        o_column = tl.arange(0, BLOCK)
        p_tile = p_rows + (first + tl.full((), 0, tl.int64)) * stride + column
        p_tile = p_tile + (o_row * stride)[:, None] + o_column[None, :]
        m_row = (o_row < count - first)[:, None]
        m_column = (o_column < WIDTH - column)[None, :]
        if MASKED and WIDTH % BLOCK != 0:
            b_tile = tl.load(p_tile, mask=m_row & m_column, other=0.0)
        elif MASKED:
            b_tile = tl.load(p_tile, mask=m_row, other=0.0)
        elif WIDTH % BLOCK != 0:
            b_tile = tl.load(p_tile, mask=m_column, other=0.0)
        else:
            b_tile = tl.load(p_tile)
    return b_tile


@triton.jit
def _add_step(b_out, p_a, p_b, stride_a, stride_b, k, first_row, first_column, inner, MASKED: tl.constexpr,
              TRANSPOSED: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr, WIDTH: tl.constexpr,
              BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_INNER: tl.constexpr):  # fmt: skip
    """out + A·B of one block of the inner dimension. → [BLOCK_ROWS, BLOCK_COLUMNS]"""
    # [BLOCK_ROWS, BLOCK_INNER]
    if TRANSPOSED:
        b_a = tl.trans(_block(p_a, stride_a, k, first_row, BLOCK_INNER, BLOCK_ROWS, DESCRIPTORS))
    else:
        b_a = _block(p_a, stride_a, first_row, k, BLOCK_ROWS, BLOCK_INNER, DESCRIPTORS)
    # [BLOCK_INNER, BLOCK_COLUMNS]
    b_b = _columns_tile(p_b, stride_b, k, inner, first_column, MASKED, BLOCK_INNER, BLOCK_COLUMNS, WIDTH, DESCRIPTORS)
    return tl.dot(b_a, b_b, b_out, input_precision=PRECISION)


@triton.jit(do_not_specialize=["rows", "inner", "steps"])
def _product_kernel(p_a, p_b, p_out, p_scale, stride_a, stride_b, stride_out, rows, inner, steps,
                    TRANSPOSED: tl.constexpr, ACCUMULATE: tl.constexpr, HAS_SCALE: tl.constexpr,
                    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr, WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr,
                    BLOCK_COLUMNS: tl.constexpr, BLOCK_INNER: tl.constexpr):  # fmt: skip
    """out (splits, rows, WIDTH) = scale · A·B, or out + A·B, with A (rows, inner) or its transpose, zero-padded to
    whole tiles, and B (inner, WIDTH). One program: a tile of out, over ``steps`` blocks of the inner dimension."""
    column_tiles: tl.constexpr = tl.cdiv(WIDTH, BLOCK_COLUMNS)
    first_row = tl.program_id(0) // column_tiles * BLOCK_ROWS
    first_column = tl.program_id(0) % column_tiles * BLOCK_COLUMNS
    low = tl.program_id(1) * steps * BLOCK_INNER
    # [BLOCK_ROWS, BLOCK_COLUMNS]
    b_out = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    # To start from what is there costs fewer registers with descriptors, to add it at the end fewer with pointers.
    if ACCUMULATE and DESCRIPTORS:
        p_tile, m_out = _target(p_out, stride_out, first_row, first_column, rows, WIDTH, BLOCK_ROWS, BLOCK_COLUMNS)
        b_out = tl.load(p_tile, mask=m_out, other=0.0)
    high = tl.minimum(low + steps * BLOCK_INNER, inner)
    # By pointers only the last step needs a mask; descriptors end with the rows.
    if DESCRIPTORS:
        full = high
    elif p_b.dtype.element_ty == tl.float32 or (WIDTH % BLOCK_COLUMNS != 0 and not TRANSPOSED):
        full = low  # two loops would spill: without tensor cores, and beside masks of columns on Triton 3.6
    else:
        full = low + (high - low) // BLOCK_INNER * BLOCK_INNER
    for k in range(low, full, BLOCK_INNER):
        b_out = _add_step(b_out, p_a, p_b, stride_a, stride_b, k, first_row, first_column, inner, False, TRANSPOSED,
                          DESCRIPTORS, PRECISION, WIDTH, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_INNER)  # fmt: skip
    if not DESCRIPTORS:
        for k in range(full, high, BLOCK_INNER):
            b_out = _add_step(b_out, p_a, p_b, stride_a, stride_b, k, first_row, first_column, inner, True, TRANSPOSED,
                              DESCRIPTORS, PRECISION, WIDTH, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_INNER)  # fmt: skip
    if HAS_SCALE:
        b_out *= tl.load(p_scale)
    ADD: tl.constexpr = ACCUMULATE and not DESCRIPTORS
    if BLOCK_COLUMNS < 256:
        _write(b_out, p_out, stride_out, first_row, first_column, rows, WIDTH, ADD)
    else:
        HALF: tl.constexpr = BLOCK_COLUMNS // 2
        b_first, b_second = halves(b_out)
        _write(b_first, p_out, stride_out, first_row, first_column, rows, WIDTH, ADD)
        _write(b_second, p_out, stride_out, first_row, first_column + HALF, rows, WIDTH, ADD)


@triton.jit
def _write(b_out, p_out, stride, first_row, first_column, rows, WIDTH: tl.constexpr, ADD: tl.constexpr):
    """Write a tile of out, or add it to what is there."""
    p_tile, m_out = _target(p_out, stride, first_row, first_column, rows, WIDTH, b_out.shape[0], b_out.shape[1])
    if ADD:
        b_out += tl.load(p_tile, mask=m_out, other=0.0)
    tl.store(p_tile, b_out.to(p_out.dtype.element_ty), mask=m_out)


@triton.jit
def _target(p_out, stride, first_row, first_column, rows, WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr,
            BLOCK_COLUMNS: tl.constexpr):  # fmt: skip
    """Where a program's tile of (splits, rows, WIDTH) lies, what of it exists. → both [BLOCK_ROWS, BLOCK_COLUMNS]"""
    o_row = tl.arange(0, BLOCK_ROWS)
    o_column = tl.arange(0, BLOCK_COLUMNS)
    p_tile = p_out + (tl.program_id(1).to(tl.int64) * rows + first_row) * stride + first_column
    m_out = (o_row < rows - first_row)[:, None] & (o_column < WIDTH - first_column)[None, :]
    return p_tile + o_row[:, None] * stride + o_column[None, :], m_out


@triton.jit
def _block(p, stride, first_row, first_column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DESCRIPTORS: tl.constexpr):
    """A tile of a matrix whose memory is whole tiles. → [ROWS, COLUMNS]"""
    if DESCRIPTORS:
        b_tile = p.load([first_row, first_column])
    else:
        p_tile = p + (first_row + tl.full((), 0, tl.int64)) * stride + first_column
        b_tile = tl.load(p_tile + tl.arange(0, ROWS)[:, None] * stride + tl.arange(0, COLUMNS)[None, :])
    return b_tile


def gradients_triton(problem: Problem, lse: Tensor, grad: Tensor, factor: Tensor, gradients: Gradients) -> None:
    """Gradients from what `compute_gradients` is given of each row, float32."""
    hidden, weight = readable(problem.taken(slice(None))), readable(problem.weight)
    kind = (hidden.dtype, hidden.shape[1], architecture_for(hidden, weight))
    config = configurations.gradient(*kind)
    to_weight, to_hidden = configurations.product(*kind, True), configurations.product(*kind, False)
    count, entries = hidden.shape[0], weight.shape[0]
    # Gradients of a size near 1 keep their small elements in float16; a power of two changes no bit of them.
    largest = torch.maximum(grad.abs(), factor.abs()).amax()
    scale = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - 1)
    grad, factor = grad / scale, factor / scale
    padded = triton.cdiv(count, config.block_rows) * config.block_rows
    columns = max(1, BLOCK_BYTES // (padded * hidden.element_size()) // config.block_columns) * config.block_columns
    columns = min(columns, triton.cdiv(entries, config.block_columns) * config.block_columns)
    buffer = hidden.new_empty((padded, columns))
    sums = hidden.new_empty((padded // config.block_rows, columns), dtype=torch.float32)
    parts = hidden.new_empty((_splits(hidden, to_hidden), *hidden.shape), dtype=torch.float32)
    for first in range(0, entries, columns):
        block = slice(first, min(entries, first + columns))
        part = replace(problem, weight=weight[block], bias=None if problem.bias is None else problem.bias[block])
        made = gradient_arguments(
            hidden,
            part,
            problem.labels - first,
            lse,
            grad,
            factor,
            buffer,
            None if gradients.bias is None else sums,
            config,
        )
        _gradient_kernel[(padded // config.block_rows * triton.cdiv(block.stop - first, config.block_columns),)](**made)
        if gradients.bias is not None:
            gradients.bias[block] = sums.sum(0)[: block.stop - first] * scale
        if gradients.weight is not None:
            _multiply(buffer, hidden, gradients.weight[block][None], scale, True, False, to_weight)
        if gradients.hidden is not None:
            _multiply(buffer, weight[block], parts, None, False, first > 0, to_hidden)
    if gradients.hidden is not None:
        gradients.hidden.index_copy_(0, problem.rows, (parts.sum(0) * scale).to(gradients.hidden.dtype))


def _splits(hidden: Tensor, config: Configuration) -> int:
    """Over how many programs each tile of the hidden states' gradient is split."""
    tiles = triton.cdiv(hidden.shape[0], config.block_rows) * triton.cdiv(hidden.shape[1], config.block_columns)
    return max(1, min(MOST_SPLITS, PROGRAMS // tiles))


def _multiply(
    a: Tensor, b: Tensor, out: Tensor, scale: Tensor | None, transposed: bool, accumulate: bool, config: Configuration
) -> None:
    """out (splits, M, d) = scale · A·B, or out + A·B, A the block of gradients or its transpose."""
    splits, rows, width = out.shape
    steps = triton.cdiv(triton.cdiv(b.shape[0], splits), config.block_inner)
    grid = (triton.cdiv(rows, config.block_rows) * triton.cdiv(width, config.block_columns), splits)
    _product_kernel[grid](**product_arguments(a, b, out, scale, transposed, accumulate, steps, config))


def gradient_arguments(
    hidden: Tensor,
    problem: Problem,
    labels: Tensor,
    lse: Tensor,
    grad: Tensor,
    factor: Tensor,
    out: Tensor,
    sums: Tensor | None,
    config: Configuration,
) -> dict[str, Any]:
    """What `_gradient_kernel` is launched with, by name; the ahead-of-time report compiles the same."""
    rule = problem.rule
    return {
        **logits_arguments(hidden, problem, config), "p_labels": labels, "p_lse": lse,
        "p_factor": factor, "p_grad": grad, "p_out": out, "p_sums": sums,
        "stride_out": out.stride(0), "smoothed": rule.smoothing / rule.vocabulary, "kept": 1 - rule.smoothing,
        "HAS_SUMS": sums is not None,
    }  # fmt: skip


def product_arguments(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    scale: Tensor | None,
    transposed: bool,
    accumulate: bool,
    steps: int,
    config: Configuration,
) -> dict[str, Any]:
    """What `_product_kernel` is launched with, by name."""
    tile = (config.block_inner, config.block_rows) if transposed else (config.block_rows, config.block_inner)
    return {
        "p_a": operand(a, *tile, config), "p_b": operand(b, config.block_inner, config.block_columns, config),
        "p_out": out, "p_scale": scale, "stride_a": a.stride(0), "stride_b": b.stride(0), "stride_out": out.stride(1),
        "rows": out.shape[1], "inner": b.shape[0], "steps": steps, "TRANSPOSED": transposed, "ACCUMULATE": accumulate,
        "HAS_SCALE": scale is not None,
        "PRECISION": precision(b), "WIDTH": b.shape[1], **config.arguments(),
    }  # fmt: skip
