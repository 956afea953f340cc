"""Pooling in a handful of PyTorch calls, whatever the number of sequences; nothing is padded.

Every mode is a weighted sum of some rows of each sequence: which rows, and with what weights, is worked out first. Then
sequences of some length are summed one by one, by PyTorch's own sum; many short ones by one segmented sum, and their
backward pass is one gather. No atomics, so the bits never change.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor

ROWS_A_BLOCK = 64
# With this many rows a sequence, on average, a call for each costs less than gathering all rows in float32.
ROWS_ONE_BY_ONE = 16


@dataclass(frozen=True)
class _Plan:
    """``rows`` (R,) taking part, sequence by sequence, their ``weights`` (R,), and how many each sequence has (N,)."""

    rows: Tensor
    weights: Tensor
    counts: Tensor


def pool_forward(hidden: Tensor, starts: Tensor, lengths: Tensor, skip: Tensor | None, mode: str) -> Tensor:
    """(T, d) → (N, d) in float32, or float64 where ``hidden`` is."""
    accumulator = torch.promote_types(hidden.dtype, torch.float32)
    if _one_by_one(hidden.shape[0], starts, mode):
        if starts.shape[0] == 1 and mode == "mean" and skip is None and (count := lengths.item()):
            # The same sum and division in half the calls, which is what one short text takes.
            return hidden.narrow(0, starts.item(), count).mean(0, keepdim=True, dtype=accumulator)
        out = hidden.new_empty((starts.shape[0], hidden.shape[1]), dtype=accumulator)
        counts = []
        for each, rows in zip(out.unbind(), _sequences(starts, lengths, skip), strict=True):
            part = hidden[rows]
            counts.append(max(1, part.shape[0]))
            if mode == "weighted_mean" and part.shape[0]:
                part = part * _rising(part.shape[0], out)[:, None]
            torch.sum(part, 0, dtype=accumulator, out=each)
        if mode == "mean":
            out.div_(counts[0] if len(counts) == 1 else out.new_tensor(counts)[:, None])
        return out
    plan = _plan(starts, lengths, skip, mode, accumulator)
    weighted = hidden.index_select(0, plan.rows).to(accumulator)
    weighted.mul_(plan.weights[:, None])
    return _segment_sum(weighted, plan.counts)


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
    """Gradient of `pool_forward`: (N, d) → (T, d) in ``dtype``, zeros on rows that took no part.

    ``padded``: some rows belong to no sequence.
    """
    if _one_by_one(total, starts, mode):
        new = torch.zeros if padded or skip is not None else torch.empty
        grad_hidden = new(total, grad.shape[1], dtype=dtype, device=grad.device)
        for each, rows in zip(grad.unbind(), _sequences(starts, lengths, skip), strict=True):
            count = rows.stop - rows.start
            if count:
                grad_hidden[rows] = each / count if mode == "mean" else each * _rising(count, grad)[:, None]
        return grad_hidden
    plan = _plan(starts, lengths, skip, mode, grad.dtype)
    owner = torch.arange(plan.counts.shape[0], device=grad.device).repeat_interleave(plan.counts)
    spread = grad.index_select(0, owner).mul_(plan.weights[:, None])
    grad_hidden = torch.zeros(total, grad.shape[1], dtype=dtype, device=grad.device)
    return grad_hidden.index_copy_(0, plan.rows, spread.to(dtype))


def _one_by_one(total: int, starts: Tensor, mode: str) -> bool:
    whole = mode in ("mean", "weighted_mean")
    return whole and starts.device.type == "cpu" and total >= ROWS_ONE_BY_ONE * starts.shape[0]


def _sequences(starts: Tensor, lengths: Tensor, skip: Tensor | None) -> Iterator[slice]:
    """The rows of each sequence that take part."""
    skipped = repeat(0) if skip is None else skip.clamp(min=0).tolist()
    for start, length, left_out in zip(starts.tolist(), lengths.tolist(), skipped, strict=False):
        yield slice(start + min(left_out, length), start + length)


def _rising(count: int, like: Tensor) -> Tensor:
    """Weights 1 … count, over their sum."""
    return torch.arange(1, count + 1, dtype=like.dtype, device=like.device) * (2 / (count * (count + 1)))


def _segment_sum(rows: Tensor, counts: Tensor) -> Tensor:
    """(R, d) → (N, d), in two steps: one running sum over thousands of rows would lose what pairwise sums keep."""
    blocks = (counts + ROWS_A_BLOCK - 1) // ROWS_A_BLOCK
    owner = torch.arange(blocks.shape[0], device=blocks.device).repeat_interleave(blocks)
    within = torch.arange(owner.shape[0], device=blocks.device) - (blocks.cumsum(0) - blocks)[owner]
    sizes = (counts[owner] - within * ROWS_A_BLOCK).clamp(max=ROWS_A_BLOCK)
    sums = torch.segment_reduce(rows, "sum", lengths=sizes, unsafe=True)
    return torch.segment_reduce(sums, "sum", lengths=blocks, unsafe=True)


def _plan(starts: Tensor, lengths: Tensor, skip: Tensor | None, mode: str, dtype: torch.dtype) -> _Plan:
    lengths = lengths.long()
    leave_out = torch.zeros_like(lengths) if skip is None else torch.minimum(skip.long().clamp(min=0), lengths)
    first, kept = starts.long() + leave_out, lengths - leave_out
    if mode in ("first", "last"):
        some = kept > 0
        rows = (first if mode == "first" else first + kept - 1)[some]
        return _Plan(rows, torch.ones(rows.shape[0], dtype=dtype, device=rows.device), some.long())
    owner = torch.arange(kept.shape[0], device=kept.device).repeat_interleave(kept)
    within = torch.arange(owner.shape[0], device=kept.device) - (kept.cumsum(0) - kept)[owner]
    size = kept[owner].to(dtype)
    weights = 1 / size if mode == "mean" else (within + 1).to(dtype) * (2 / (size * (size + 1)))
    return _Plan(first[owner] + within, weights, kept)
