"""Pooling defined: a loop over sequences. Slow and obvious; the other implementations are tested against it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import SequenceLayout


def pool_reference(hidden: Tensor, layout: SequenceLayout, mode: str, skip: Tensor | None) -> Tensor:
    """(T, d) → (N, d); ``mode`` is one of mean, weighted_mean, mean_sqrt_len, max, last, first. See `pool`."""
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    skipped = [0] * len(layout) if skip is None else skip.clamp(min=0).tolist()
    pooled = [
        _pool_one(wide[start + min(leave_out, length) : start + length], mode)
        for start, length, leave_out in zip(layout.starts.tolist(), layout.lengths.tolist(), skipped, strict=True)
    ]
    return torch.stack(pooled) if pooled else wide[:0]  # no sequences, but still a gradient


def _pool_one(rows: Tensor, mode: str) -> Tensor:
    if rows.shape[0] == 0:
        return rows.sum(0)  # zeros
    if mode == "first":
        return rows[0]
    if mode == "last":
        return rows[-1]
    if mode == "mean":
        return rows.mean(0)
    if mode == "mean_sqrt_len":
        return rows.sum(0) / rows.shape[0] ** 0.5
    if mode == "max":
        return rows.max(0).values  # the first of equal ones takes the gradient
    weights = torch.arange(1, rows.shape[0] + 1, dtype=rows.dtype, device=rows.device)
    return (rows * weights[:, None]).sum(0) / weights.sum()
