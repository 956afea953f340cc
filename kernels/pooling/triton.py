"""Pooling for GPUs: every row that takes part is read once, and the order of the sums never changes.

One program sums some columns of one sequence; where there are few sequences, several programs share the rows of one,
and their sums are added up afterwards.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import processors, readable

BLOCK_R, BLOCK_D, WARPS = 16, 256, 4
# Blocks of rows summed by themselves before they are added to the total: one long running sum would lose precision.
STEPS = 8
PROGRAMS_A_PROCESSOR = 4
MOST_SPLITS = 64


@triton.jit
def _rows_of(p_starts, p_lengths, p_skip, sequence, MODE: tl.constexpr, HAS_SKIP: tl.constexpr):
    """First row of a sequence, its length, and the positions [low, high) that take part."""
    start = tl.load(p_starts + sequence).to(tl.int64)  # T·d can pass 2³¹
    length = tl.load(p_lengths + sequence)
    low = 0
    if HAS_SKIP:
        low = tl.minimum(tl.maximum(tl.load(p_skip + sequence), 0), length).to(tl.int32)
    high = length
    if MODE == "first":
        high = tl.minimum(low + 1, length)
    if MODE == "last":
        low = tl.maximum(low, length - 1)
    return start, length, low, high


@triton.jit
def _weights(o_row, low, high, MODE: tl.constexpr):
    """What each position adds to the result, 0 where it takes no part. [BLOCK_R]"""
    count = tl.maximum(high - low, 1).to(tl.float32)
    if MODE == "weighted_mean":
        b_weight = (o_row - low + 1).to(tl.float32) * (2.0 / (count * (count + 1.0)))
    else:
        b_weight = tl.zeros_like(o_row).to(tl.float32) + 1.0 / count
    return tl.where((o_row >= low) & (o_row < high), b_weight, 0.0)


@triton.jit(do_not_specialize=["splits"])
def _forward_kernel(p_hidden, p_starts, p_lengths, p_skip, p_out, stride, splits,
                    MODE: tl.constexpr, HAS_SKIP: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr,
                    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """One program: every splits-th block of rows of one sequence. hidden (T, d) → out (N, splits, d)."""
    sequence = tl.program_id(0)
    split = tl.program_id(1)
    start, _, low, high = _rows_of(p_starts, p_lengths, p_skip, sequence, MODE, HAS_SKIP)
    o_r = tl.arange(0, BLOCK_R)
    o_d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < COLUMNS
    o_tile = o_r[:, None] * stride + o_d[None, :]
    # [BLOCK_R, BLOCK_D]
    b_sum = tl.zeros((BLOCK_R, BLOCK_D), dtype=tl.float32)
    for chunk in range(low + split * BLOCK_R, high, splits * BLOCK_R * STEPS):
        b_part = tl.zeros((BLOCK_R, BLOCK_D), dtype=tl.float32)
        for first in range(chunk, tl.minimum(chunk + splits * BLOCK_R * STEPS, high), splits * BLOCK_R):
            o_row = first + o_r
            mask = (o_row < high)[:, None] & m_d[None, :]
            b_x = tl.load(p_hidden + (start + first) * stride + o_tile, mask=mask, other=0.0).to(tl.float32)
            b_part += b_x * _weights(o_row, low, high, MODE)[:, None]
        b_sum += b_part
    p_out += (sequence.to(tl.int64) * splits + split) * COLUMNS
    tl.store(p_out + o_d, tl.sum(b_sum, axis=0), mask=m_d)


@triton.jit(do_not_specialize=["splits"])
def _backward_kernel(p_grad, p_starts, p_lengths, p_skip, p_grad_hidden, stride, splits,
                     MODE: tl.constexpr, HAS_SKIP: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_R: tl.constexpr,
                     BLOCK_D: tl.constexpr):  # fmt: skip
    """One program: every splits-th block of rows of one sequence. grad (N, d) → every row of every sequence (T, d)."""
    sequence = tl.program_id(0)
    start, length, low, high = _rows_of(p_starts, p_lengths, p_skip, sequence, MODE, HAS_SKIP)
    o_r = tl.arange(0, BLOCK_R)
    o_d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < COLUMNS
    # [BLOCK_D]
    b_grad = tl.load(p_grad + sequence.to(tl.int64) * stride + o_d, mask=m_d, other=0.0).to(tl.float32)
    for first in range(tl.program_id(1) * BLOCK_R, length, splits * BLOCK_R):
        o_row = first + o_r
        # [BLOCK_R, BLOCK_D]
        b_out = b_grad[None, :] * _weights(o_row, low, high, MODE)[:, None]
        p_tile = p_grad_hidden + (start + first) * COLUMNS + o_r[:, None] * COLUMNS + o_d[None, :]
        mask = (o_row < length)[:, None] & m_d[None, :]
        tl.store(p_tile, b_out.to(p_grad_hidden.dtype.element_ty), mask=mask)


def pool_forward(hidden: Tensor, starts: Tensor, lengths: Tensor, skip: Tensor | None, mode: str) -> Tensor:
    """(T, d) → (N, d) in float32."""
    hidden = readable(hidden)
    count, columns = starts.shape[0], hidden.shape[1]
    splits = 1 if mode in ("first", "last") else _splits(count, columns, hidden.device)
    out = hidden.new_empty((count, splits, columns), dtype=torch.float32)
    if out.numel():
        grid = (count, splits, triton.cdiv(columns, BLOCK_D))
        _forward_kernel[grid](**forward_arguments(hidden, starts, lengths, skip, out, mode))
    return out.view(count, columns) if splits == 1 else out.sum(1)


def pool_backward(
    grad: Tensor,
    total: int,
    starts: Tensor,
    lengths: Tensor,
    skip: Tensor | None,
    mode: str,
    dtype: torch.dtype,
    padded: bool,
) -> Tensor:
    """Gradient of `pool_forward`: (N, d) → (T, d) in ``dtype``, zeros on rows that took no part."""
    grad = readable(grad)
    count, columns = grad.shape
    new = torch.zeros if padded else torch.empty
    grad_hidden = new((total, columns), dtype=dtype, device=grad.device)
    if grad_hidden.numel() and count:
        splits = _splits(count, columns, grad.device)
        grid = (count, splits, triton.cdiv(columns, BLOCK_D))
        _backward_kernel[grid](**backward_arguments(grad, starts, lengths, skip, grad_hidden, splits, mode))
    return grad_hidden


def forward_arguments(
    hidden: Tensor, starts: Tensor, lengths: Tensor, skip: Tensor | None, out: Tensor, mode: str
) -> dict[str, Any]:
    """What `_forward_kernel` is launched with, by name; the ahead-of-time report compiles the same."""
    return {
        "p_hidden": hidden, "p_starts": starts, "p_lengths": lengths, "p_skip": skip, "p_out": out,
        "stride": hidden.stride(0), "splits": out.shape[1], "STEPS": STEPS,
        **_shared_arguments(skip, mode, out.shape[2]),
    }  # fmt: skip


def backward_arguments(
    grad: Tensor, starts: Tensor, lengths: Tensor, skip: Tensor | None, grad_hidden: Tensor, splits: int, mode: str
) -> dict[str, Any]:
    """What `_backward_kernel` is launched with, by name."""
    return {
        "p_grad": grad, "p_starts": starts, "p_lengths": lengths, "p_skip": skip, "p_grad_hidden": grad_hidden,
        "stride": grad.stride(0), "splits": splits, **_shared_arguments(skip, mode, grad.shape[1]),
    }  # fmt: skip


def _shared_arguments(skip: Tensor | None, mode: str, columns: int) -> dict[str, Any]:
    return {
        "MODE": mode, "HAS_SKIP": skip is not None, "COLUMNS": columns, "BLOCK_R": BLOCK_R, "BLOCK_D": BLOCK_D,
        "num_warps": WARPS, "num_stages": 1,
    }  # fmt: skip


def _splits(count: int, columns: int, device: torch.device) -> int:
    """Programs that share a sequence: enough to fill the device where there are few sequences."""
    programs = count * triton.cdiv(columns, BLOCK_D)
    return max(1, min(MOST_SPLITS, PROGRAMS_A_PROCESSOR * processors(device) // max(1, programs)))
