"""Pooling for GPUs: every row that takes part is read once, and the order of the sums never changes.

One program sums some columns of one sequence, or finds their maxima; where there are few sequences, several programs
share the rows of one, and their results are put together afterwards.
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
        b_weight = tl.zeros_like(o_row).to(tl.float32) + (tl.rsqrt(count) if MODE == "mean_sqrt_len" else 1.0 / count)
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
def _max_kernel(p_hidden, p_starts, p_lengths, p_skip, p_out, stride, splits,
                MODE: tl.constexpr, HAS_SKIP: tl.constexpr, COLUMNS: tl.constexpr,
                BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """One program: every splits-th block of rows of one sequence. hidden (T, d) → out (N, splits, d) int64.

    The upper half is the largest number's bits, so ordered that a larger number is a larger integer and NaN the
    largest; the lower half counts down with the row, so that the first of equal numbers wins.
    """
    sequence = tl.program_id(0)
    split = tl.program_id(1)
    start, _, low, high = _rows_of(p_starts, p_lengths, p_skip, sequence, MODE, HAS_SKIP)
    o_r = tl.arange(0, BLOCK_R)
    o_d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < COLUMNS
    o_tile = o_r[:, None] * stride + o_d[None, :]
    # [BLOCK_R, BLOCK_D]
    b_best = tl.full((BLOCK_R, BLOCK_D), -(2**63), dtype=tl.int64)
    for first in range(low + split * BLOCK_R, high, splits * BLOCK_R):
        o_row = first + o_r
        mask = (o_row < high)[:, None] & m_d[None, :]
        b_x = tl.load(p_hidden + (start + first) * stride + o_tile, mask=mask, other=0.0).to(tl.float32)
        b_bits = tl.where(b_x == 0.0, 0.0, b_x).to(tl.int32, bitcast=True)  # −0 is no less than 0
        b_bits = tl.where(b_x != b_x, 0x7FFFFFFF, b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF))
        b_key = (b_bits.to(tl.int64) << 32) | (0x7FFFFFFF - o_row).to(tl.int64)[:, None]
        b_best = tl.where(mask, tl.maximum(b_best, b_key), b_best)
    p_out += (sequence.to(tl.int64) * splits + split) * COLUMNS
    tl.store(p_out + o_d, tl.max(b_best, axis=0), mask=m_d)


@triton.jit(do_not_specialize=["splits"])
def _backward_kernel(p_grad, p_places, p_starts, p_lengths, p_skip, p_grad_hidden, stride, splits,
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
    if MODE == "max":
        b_place = tl.load(p_places + sequence.to(tl.int64) * COLUMNS + o_d, mask=m_d, other=-1) - start.to(tl.int32)
    for first in range(tl.program_id(1) * BLOCK_R, length, splits * BLOCK_R):
        o_row = first + o_r
        # [BLOCK_R, BLOCK_D]
        if MODE == "max":
            b_out = tl.where(o_row[:, None] == b_place[None, :], b_grad[None, :], 0.0)
        else:
            b_out = b_grad[None, :] * _weights(o_row, low, high, MODE)[:, None]
        p_tile = p_grad_hidden + (start + first) * COLUMNS + o_r[:, None] * COLUMNS + o_d[None, :]
        mask = (o_row < length)[:, None] & m_d[None, :]
        tl.store(p_tile, b_out.to(p_grad_hidden.dtype.element_ty), mask=mask)


def pool_forward(
    hidden: Tensor, starts: Tensor, lengths: Tensor, skip: Tensor | None, mode: str
) -> tuple[Tensor, Tensor]:
    """(T, d) → (N, d) in float32, and the rows of maxima, (N, d) int32."""
    hidden = readable(hidden)
    count, columns = starts.shape[0], hidden.shape[1]
    splits = 1 if mode in ("first", "last") else _splits(count, columns, hidden.device)
    out = hidden.new_empty((count, splits, columns), dtype=torch.int64 if mode == "max" else torch.float32)
    if out.numel():
        grid = (count, splits, triton.cdiv(columns, BLOCK_D))
        kernel = _max_kernel if mode == "max" else _forward_kernel
        kernel[grid](**forward_arguments(hidden, starts, lengths, skip, out, mode))
    if mode == "max":
        return _unpacked(out.amax(1), starts)
    return out.view(count, columns) if splits == 1 else out.sum(1), starts.new_empty(0)


def _unpacked(best: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """What `_max_kernel` packed, (N, d): the maxima, 0 where there is none, and their rows, −1 there."""
    bits = (best >> 32).int()
    values = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)
    some = best != torch.iinfo(torch.int64).min
    places = starts[:, None] + (0x7FFFFFFF - (best & 0xFFFFFFFF)).int()
    return torch.where(some, values, 0.0), torch.where(some, places, -1)


def pool_backward(
    grad: Tensor,
    places: Tensor,
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
        _backward_kernel[grid](**backward_arguments(grad, places, starts, lengths, skip, grad_hidden, splits, mode))
    return grad_hidden


def forward_arguments(
    hidden: Tensor, starts: Tensor, lengths: Tensor, skip: Tensor | None, out: Tensor, mode: str
) -> dict[str, Any]:
    """What `_forward_kernel` or `_max_kernel` is launched with; the ahead-of-time report compiles the same."""
    steps = {} if mode == "max" else {"STEPS": STEPS}
    return {
        "p_hidden": hidden, "p_starts": starts, "p_lengths": lengths, "p_skip": skip, "p_out": out,
        "stride": hidden.stride(0), "splits": out.shape[1], **steps, **_shared_arguments(skip, mode, out.shape[2]),
    }  # fmt: skip


def backward_arguments(
    grad: Tensor,
    places: Tensor,
    starts: Tensor,
    lengths: Tensor,
    skip: Tensor | None,
    grad_hidden: Tensor,
    splits: int,
    mode: str,
) -> dict[str, Any]:
    """What `_backward_kernel` is launched with, by name."""
    return {
        "p_grad": grad, "p_places": places if mode == "max" else None, "p_starts": starts, "p_lengths": lengths,
        "p_skip": skip, "p_grad_hidden": grad_hidden, "stride": grad.stride(0), "splits": splits,
        **_shared_arguments(skip, mode, grad.shape[1]),
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
