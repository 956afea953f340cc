"""Pooling in a handful of PyTorch calls, whatever the number of sequences; nothing is padded.

Every mode but "max" is a weighted sum of some rows of each sequence: which rows, and with what weights, is worked out
first. Then sequences of some length are summed one by one, by PyTorch's own sum; many short ones by one segmented sum,
and their backward pass is one gather. Maxima are found in the same two ways, and their places kept for the backward
pass. No atomics on floats, so the bits never change.
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


def pool_forward(
    hidden: Tensor, starts: Tensor, lengths: Tensor, skip: Tensor | None, mode: str, with_places: bool = True
) -> tuple[Tensor, Tensor]:
    """(T, d) → (N, d) in float32, or float64 where ``hidden`` is, and the rows of maxima, (N, d), where asked for."""
    accumulator = torch.promote_types(hidden.dtype, torch.float32)
    places = starts.new_empty((starts.shape[0], hidden.shape[1]) if mode == "max" and with_places else 0)
    if mode == "max":
        return _maxima(hidden, starts, lengths, skip, places).to(accumulator), places
    return _weighted_sum(hidden, starts, lengths, skip, mode, accumulator), places


def _weighted_sum(
    hidden: Tensor, starts: Tensor, lengths: Tensor, skip: Tensor | None, mode: str, accumulator: torch.dtype
) -> Tensor:
    if _one_by_one(hidden.shape[0], starts, mode):
        if starts.shape[0] == 1 and mode == "mean" and skip is None and (count := lengths.item()):
            # The same sum and division in half the calls, which is what one short text takes.
            return hidden.narrow(0, starts.item(), count).mean(0, keepdim=True, dtype=accumulator)
        out = hidden.new_empty((starts.shape[0], hidden.shape[1]), dtype=accumulator)
        sizes = []
        for each, rows in zip(out.unbind(), _sequences(starts, lengths, skip), strict=True):
            part = hidden[rows]
            sizes.append(_divisor(max(1, part.shape[0]), mode))
            if mode == "weighted_mean" and part.shape[0]:
                part = part * _rising(part.shape[0], out)[:, None]
            torch.sum(part, 0, dtype=accumulator, out=each)
        if mode != "weighted_mean":
            out.div_(sizes[0] if len(sizes) == 1 else out.new_tensor(sizes)[:, None])
        return out
    plan = _plan(starts, lengths, skip, mode, accumulator)
    weighted = hidden.index_select(0, plan.rows).to(accumulator)
    weighted.mul_(plan.weights[:, None])
    return _segment_sum(weighted, plan.counts)


def _maxima(hidden: Tensor, starts: Tensor, lengths: Tensor, skip: Tensor | None, places: Tensor) -> Tensor:
    """(T, d) → (N, d); writes their rows into ``places``, if that has elements."""
    if _one_by_one(hidden.shape[0], starts, "max"):
        out = hidden.new_zeros(starts.shape[0], hidden.shape[1])
        places.fill_(-1)
        for i, rows in enumerate(_sequences(starts, lengths, skip)):
            part = hidden[rows]
            if part.shape[0] and places.numel():
                out[i], first = part.max(0)
                places[i] = first + rows.start
            elif part.shape[0]:
                out[i] = part.amax(0)
        return out
    plan = _plan(starts, lengths, skip, "max", torch.float32)
    taken, none = hidden.index_select(0, plan.rows), (plan.counts == 0)[:, None]
    wide = taken.to(torch.promote_types(hidden.dtype, torch.float32))
    out = torch.segment_reduce(wide, "max", lengths=plan.counts, unsafe=True)
    if places.numel():
        owner = _owners(plan.counts)
        hit = (wide == out[owner]) | wide.isnan()
        rows = torch.where(hit, plan.rows.int()[:, None], hidden.shape[0])
        places.fill_(hidden.shape[0]).scatter_reduce_(0, owner[:, None].expand_as(rows), rows, "amin")
        places.masked_fill_(none, -1)
    return out.masked_fill_(none, 0)


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
    """Gradient of `pool_forward`: (N, d) → (T, d) in ``dtype``, zeros on rows that took no part.

    ``padded``: some rows belong to no sequence.
    """
    if mode == "max":  # what has no maximum goes into one row more, which is dropped
        grad_hidden = torch.zeros(total + 1, grad.shape[1], dtype=dtype, device=grad.device)
        rows = torch.where(places < 0, total, places).long()
        return grad_hidden.scatter_(0, rows, grad.to(dtype))[:total]
    if _one_by_one(total, starts, mode):
        new = torch.zeros if padded or skip is not None else torch.empty
        grad_hidden = new(total, grad.shape[1], dtype=dtype, device=grad.device)
        for each, rows in zip(grad.unbind(), _sequences(starts, lengths, skip), strict=True):
            count = rows.stop - rows.start
            if count:
                weighted = mode == "weighted_mean"
                grad_hidden[rows] = each * _rising(count, grad)[:, None] if weighted else each / _divisor(count, mode)
        return grad_hidden
    plan = _plan(starts, lengths, skip, mode, grad.dtype)
    spread = grad.index_select(0, _owners(plan.counts)).mul_(plan.weights[:, None])
    grad_hidden = torch.zeros(total, grad.shape[1], dtype=dtype, device=grad.device)
    return grad_hidden.index_copy_(0, plan.rows, spread.to(dtype))


def _one_by_one(total: int, starts: Tensor, mode: str) -> bool:
    whole = mode not in ("first", "last")
    return whole and starts.device.type == "cpu" and total >= ROWS_ONE_BY_ONE * starts.shape[0]


def _sequences(starts: Tensor, lengths: Tensor, skip: Tensor | None) -> Iterator[slice]:
    """The rows of each sequence that take part."""
    skipped = repeat(0) if skip is None else skip.clamp(min=0).tolist()
    for start, length, left_out in zip(starts.tolist(), lengths.tolist(), skipped, strict=False):
        yield slice(start + min(left_out, length), start + length)


def _divisor(count: int, mode: str) -> float:
    return count**0.5 if mode == "mean_sqrt_len" else count


def _owners(counts: Tensor) -> Tensor:
    """(N,) → (R,): which sequence each row is of."""
    return torch.arange(counts.shape[0], device=counts.device).repeat_interleave(counts)


def _rising(count: int, like: Tensor) -> Tensor:
    """Weights 1 … count, over their sum."""
    return torch.arange(1, count + 1, dtype=like.dtype, device=like.device) * (2 / (count * (count + 1)))


def _segment_sum(rows: Tensor, counts: Tensor) -> Tensor:
    """(R, d) → (N, d), in two steps: one running sum over thousands of rows would lose what pairwise sums keep."""
    blocks = (counts + ROWS_A_BLOCK - 1) // ROWS_A_BLOCK
    owner = _owners(blocks)
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
    owner = _owners(kept)
    within = torch.arange(owner.shape[0], device=kept.device) - (kept.cumsum(0) - kept)[owner]
    size = kept[owner].to(dtype)
    if mode == "weighted_mean":
        weights = (within + 1).to(dtype) * (2 / (size * (size + 1)))
    else:
        weights = size.rsqrt() if mode == "mean_sqrt_len" else 1 / size
    return _Plan(first[owner] + within, weights, kept)
