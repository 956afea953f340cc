"""The log-sum-exp of every row's logits on a GPU, where no logit leaves the tile it is made in.

A program multiplies one tile of rows with one tile of the vocabulary, over the whole width, and writes what is left of
the tile: a row's log-sum-exp over these entries, and its label's logit if that is among them. Nothing is shared, so
nothing is locked; what the tiles say of a row is joined afterwards. Programs that run together share their entries,
so the weight is read from memory once while the rows, which are few, stay in the level-2 cache.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..launch import architecture_of, readable
from ..triton_math import LN_2, LOG2_E, dot_rows, tanh
from . import configurations
from .configurations import Configuration
from .rule import Problem, Statistics

# A maximum that is finite whatever the logits never meets −inf − −inf.
LOWEST = tl.constexpr(-3.0e38)
# What the tiles say of the rows, before it is joined: rows beyond it wait for another launch.
PARTIAL_BYTES = 32 * 1024 * 1024


@triton.jit
def _logits_tile(p_hidden, p_weight, p_bias, stride_h, stride_w, first_row, first_entry, rows, entries, softcap,
                 HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, FLOAT32: tl.constexpr, DESCRIPTORS: tl.constexpr,
                 PRECISION: tl.constexpr, WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
                 BLOCK_INNER: tl.constexpr):  # fmt: skip
    """Logits in float32, −inf past the vocabulary's end, whatever past the rows'. → [BLOCK_ROWS, BLOCK_COLUMNS]"""
    b_x = dot_rows(p_hidden, p_weight, stride_h, stride_w, first_row, first_entry, rows, entries, WIDTH, DESCRIPTORS,
                   PRECISION, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_INNER)  # fmt: skip
    o_entry = first_entry + tl.arange(0, BLOCK_COLUMNS)
    if HAS_BIAS:
        b_x += tl.load(p_bias + o_entry, mask=o_entry < entries, other=0.0).to(tl.float32)[None, :]
    if HAS_SOFTCAP:
        b_x = softcap * tanh(b_x / softcap, FLOAT32)
    return tl.where((o_entry < entries)[None, :], b_x, float("-inf"))


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(p_hidden, p_weight, p_bias, p_labels, p_lse, p_label, p_total, p_highest, stride_h, stride_w,
                    rows, entries, softcap,
                    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_TOTAL: tl.constexpr,
                    HAS_HIGHEST: tl.constexpr, FLOAT32: tl.constexpr, DESCRIPTORS: tl.constexpr,
                    PRECISION: tl.constexpr, WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
                    BLOCK_INNER: tl.constexpr):  # fmt: skip
    """One program: a tile of rows and entries. Writes lse, total, highest (tiles of entries, N) and label (N,)."""
    row_tiles = tl.cdiv(rows, BLOCK_ROWS)
    entry_tile = tl.program_id(0) // row_tiles
    first_row = tl.program_id(0) % row_tiles * BLOCK_ROWS
    first_entry = entry_tile * BLOCK_COLUMNS
    # [BLOCK_ROWS, BLOCK_COLUMNS]
    b_x = _logits_tile(p_hidden, p_weight, p_bias, stride_h, stride_w, first_row, first_entry, rows, entries, softcap,
                       HAS_BIAS, HAS_SOFTCAP, FLOAT32, DESCRIPTORS, PRECISION, WIDTH, BLOCK_ROWS, BLOCK_COLUMNS,
                       BLOCK_INNER)  # fmt: skip
    o_row = first_row + tl.arange(0, BLOCK_ROWS)
    o_entry = first_entry + tl.arange(0, BLOCK_COLUMNS)
    m_row = o_row < rows
    # [BLOCK_ROWS]
    b_highest = tl.max(b_x, 1)
    b_peak = tl.maximum(b_highest, LOWEST)
    b_sum = tl.sum(tl.exp2((b_x - b_peak[:, None]) * LOG2_E), 1)
    o_part = entry_tile.to(tl.int64) * rows + o_row
    tl.store(p_lse + o_part, b_peak + tl.log2(b_sum) * LN_2, mask=m_row)
    if HAS_TOTAL:
        tl.store(p_total + o_part, tl.sum(tl.where((o_entry < entries)[None, :], b_x, 0.0), 1), mask=m_row)
    if HAS_HIGHEST:
        tl.store(p_highest + o_part, b_highest, mask=m_row)
    b_label = tl.load(p_labels + o_row, mask=m_row, other=-1)
    m_here = (b_label >= first_entry) & (b_label < first_entry + BLOCK_COLUMNS) & (b_label < entries)
    m_label = o_entry[None, :] == b_label[:, None]
    tl.store(p_label + o_row, tl.sum(tl.where(m_label, b_x, 0.0), 1), mask=m_here)


def forward_triton(problem: Problem, accuracy: bool) -> Statistics:
    """What the losses of the labelled rows are made of."""
    hidden, weight = readable(problem.taken(slice(None))), readable(problem.weight)
    problem = replace(problem, weight=weight)
    config = configurations.forward(hidden.dtype, hidden.shape[1], architecture_for(hidden, weight))
    tiles = triton.cdiv(weight.shape[0], config.block_columns)
    buffers = 1 + bool(problem.rule.smoothing) + accuracy
    step = max(1, PARTIAL_BYTES // (4 * buffers * tiles * config.block_rows)) * config.block_rows
    blocks = [slice(first, first + step) for first in range(0, hidden.shape[0], step)]
    return Statistics.joined(
        [_forward_rows(hidden[x], problem.labels[x], problem, tiles, config, accuracy) for x in blocks]
    )


def _forward_rows(
    hidden: Tensor, labels: Tensor, problem: Problem, tiles: int, config: Configuration, accuracy: bool
) -> Statistics:
    count = hidden.shape[0]
    lse = hidden.new_empty((tiles, count), dtype=torch.float32)
    total = torch.empty_like(lse) if problem.rule.smoothing else None
    highest = torch.empty_like(lse) if accuracy else None
    label = lse.new_full((count,), float("nan"))
    arguments = forward_arguments(hidden, problem, labels, lse, label, total, highest, config)
    _forward_kernel[(tiles * triton.cdiv(count, config.block_rows),)](**arguments)
    return Statistics(
        lse.logsumexp(0), label, None if total is None else total.sum(0), None if highest is None else highest.amax(0)
    )


def forward_arguments(
    hidden: Tensor,
    problem: Problem,
    labels: Tensor,
    lse: Tensor,
    label: Tensor,
    total: Tensor | None,
    highest: Tensor | None,
    config: Configuration,
) -> dict[str, Any]:
    """What `_forward_kernel` is launched with, by name; the ahead-of-time report compiles the same."""
    return {
        **logits_arguments(hidden, problem, config), "p_labels": labels, "p_lse": lse, "p_label": label,
        "p_total": total, "p_highest": highest, "HAS_TOTAL": total is not None, "HAS_HIGHEST": highest is not None,
    }  # fmt: skip


def logits_arguments(hidden: Tensor, problem: Problem, config: Configuration) -> dict[str, Any]:
    """What every kernel that makes logits is told, by name."""
    weight, softcap = problem.weight, problem.rule.softcap
    return {
        "p_hidden": operand(hidden, config.block_rows, config.block_inner, config),
        "p_weight": operand(weight, config.block_columns, config.block_inner, config),
        "p_bias": problem.bias, "stride_h": hidden.stride(0), "stride_w": weight.stride(0), "rows": hidden.shape[0],
        "entries": weight.shape[0], "softcap": softcap or 1.0, "HAS_BIAS": problem.bias is not None,
        "HAS_SOFTCAP": softcap is not None, "FLOAT32": hidden.dtype == torch.float32, "PRECISION": precision(hidden),
        "WIDTH": hidden.shape[1], **config.arguments(),
    }  # fmt: skip


def operand(x: Tensor, rows: int, columns: int, config: Configuration) -> Tensor | TensorDescriptor:
    """A matrix as the kernel reads it: by descriptor of tiles (rows, columns), or by pointer."""
    return TensorDescriptor.from_tensor(x, [rows, columns]) if config.descriptors else x


def architecture_for(*operands: Tensor) -> str:
    """The architecture to choose a configuration for, or `UNALIGNED`."""
    aligned = all(x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0 for x in operands)
    return architecture_of(operands[0].device) if aligned else configurations.UNALIGNED


def precision(x: Tensor) -> str:
    """float32 products follow PyTorch's own switch: exact unless the user allowed TF32."""
    return "tf32" if x.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"
