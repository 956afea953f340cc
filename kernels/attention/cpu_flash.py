"""Sequences of middling length in float32 on a CPU through PyTorch's own flash attention.

It is faster than batched products there, and its memory linear in the length. It loses to single large products, so
long sequences are not for it; see `products`. In bfloat16 it is slower than ours, and sums gradients in bfloat16; it
has no window, softcap or dropout of our kind.
"""

from __future__ import annotations

import math
import sys
from typing import Protocol

import torch
from torch import Tensor

from .grouping import QUERY_BLOCK, Run
from .products import LEAST_SCORES, least_length_alone, runs_alone

# Measured on 2 Zen 5 cores: from here on it is the faster one. In training more sequences share a call of ours.
LEAST_LENGTH = 33
LEAST_LENGTH_TRAINING = 48
# Before, it read past the end of keys that several query heads share.
READS_GROUPED_HEADS = torch.__version__ >= (2, 9)


class Rule(Protocol):
    """What of a rule matters here."""

    causal: bool
    window: int | None
    softcap: float | None
    scale: float
    dropout: object | None


def lengths(q: Tensor, kv_heads: int, rule: Rule, training: bool) -> range:
    """The lengths of sequences that are for `forward` and `backward` here."""
    if q.device.type != "cpu" or q.dtype != torch.float32 or rule.softcap is not None or rule.dropout is not None:
        return range(0)
    least = LEAST_LENGTH_TRAINING if training else LEAST_LENGTH
    stop = sys.maxsize if rule.window is None else rule.window + 2
    if runs_alone(q, LEAST_SCORES * q.shape[2]):
        stop = min(stop, least_length_alone(q.shape[1] // kv_heads, QUERY_BLOCK))
    return range(least, stop)


def forward(q: Tensor, k: Tensor, v: Tensor, run: Run, rule: Rule, *, with_gradient: bool) -> tuple[Tensor, Tensor]:
    """A run of q (T, Hq, D), k and v (T, Hkv, D) → output (rows, Hq, D), log-sum-exp (rows, Hq).

    ``with_gradient`` prepares for `backward`, which needs it.
    """
    q, k, v = _heads_first(q, k, v, run=run)
    q, scale = _scaled(q, rule.scale) if with_gradient else (q, rule.scale)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, rule.causal, scale=scale)
    return _rows_first(out), _rows_first(lse)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, run: Run, rule: Rule
) -> tuple[Tensor, Tensor, Tensor]:
    """A run's gradients of q, k and v, with its rows alone, from what `forward` gave for all."""
    kv_heads = k.shape[1]
    grad, q, k, v, out, lse = _heads_first(grad, q, k, v, out, lse, run=run)
    q, scale = _scaled(q, rule.scale)
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, lse, 0.0, rule.causal, scale=scale
    )
    if scale != rule.scale:
        dq *= rule.scale
    if dk.shape[1] != kv_heads:  # repeated keys and values
        dk, dv = (x.unflatten(1, (kv_heads, -1)).sum(2) for x in (dk, dv))
    return _rows_first(dq), _rows_first(dk), _rows_first(dv)


def _scaled(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """q and scale, whose product in the kernel is rounded the same forward and backward.

    The kernel scales the finished logits forward, but inside their product backward: the same only for a power of
    two. A difference between them is one between logit and log-sum-exp, which large logits magnify.
    """
    return (q, scale) if math.frexp(scale)[0] == 0.5 else (q * scale, 1.0)


def _heads_first(*tensors: Tensor, run: Run) -> list[Tensor]:
    """A run of (T, H, …) as views (count, H, L, …); fewer heads are repeated to as many as the first has, if need be.

    One operation a view: hundreds of short runs a pass would else cost more in views than in attention.
    """
    views = []
    for x in tensors:
        row, *rest = x.stride()
        size, stride = (run.count, x.shape[1], run.length, *x.shape[2:]), (run.length * row, rest[0], row, *rest[1:])
        views.append(x.as_strided(size, stride, x.storage_offset() + run.start * row))
    if READS_GROUPED_HEADS:
        return views
    return [x.repeat_interleave(views[0].shape[1] // x.shape[1], 1) for x in views]


def _rows_first(x: Tensor) -> Tensor:
    """(count, H, L, …) → (count · L, H, …), a view of what the kernel returns."""
    return x.transpose(1, 2).flatten(0, 1)
