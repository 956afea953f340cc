"""The definition of attention over sequences: short, for any dtype up to float64, differentiable. Tests trust it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import SequenceLayout
from .dropout import Dropout


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: SequenceLayout,
    *,
    causal: bool,
    window: int | None,
    softcap: float | None,
    scale: float,
    dropout: Dropout | None = None,
) -> tuple[Tensor, Tensor]:
    """One sequence after the other → output (T, Hq, D) and log-sum-exp (T, Hq); rows in no sequence hold 0 and −inf."""
    group = q.shape[1] // k.shape[1]
    outputs = [q[:0] + (k[:0] + v[:0]).repeat_interleave(group, dim=1)]  # no sequences, but still a gradient
    sums = [q.new_empty((0, q.shape[1]), dtype=_accumulator(q.dtype))]
    for i, (start, length) in enumerate(zip(layout.starts.tolist(), layout.lengths.tolist(), strict=True)):
        rows = slice(start, start + length)
        b_k, b_v = (x[rows].repeat_interleave(group, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[rows], b_k) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~visible(length, causal, window, q.device), float("-inf"))
        weights = scores.softmax(-1, dtype=_accumulator(q.dtype)).to(q.dtype)
        if dropout is not None:
            heads, positions = (torch.arange(n, device=q.device) for n in (q.shape[1], length))
            weights = weights * dropout.factors(positions.new_tensor([i]), heads, positions, 0, length)[0].to(q.dtype)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, b_v))
        sums.append(scores.to(_accumulator(q.dtype)).logsumexp(-1).T)
    out = torch.zeros_like(q).index_copy(0, layout.rows, torch.cat(outputs))
    lse = out.new_full(q.shape[:2], float("-inf"), dtype=_accumulator(q.dtype))
    return out, lse.index_copy(0, layout.rows, torch.cat(sums))


def visible(length: int, causal: bool, window: int | None, device: torch.device) -> Tensor:
    """(length, length) bool: which keys (columns) each query (row) attends to."""
    position = torch.arange(length, device=device)
    distance = position[:, None] - position
    seen = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    return seen if window is None else seen & (distance.abs() <= window)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
