"""The blocked path as PyTorch operators: whole to torch.compile, differentiable, with shapes known beforehand.

A window below 0, a softcap of 0 and a dropout threshold of 0 mean none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..layout import SequenceLayout
from .blocked import Rule, accumulator, blocked_backward, blocked_forward


def attention_blocked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: SequenceLayout,
    *,
    causal: bool,
    window: int | None,
    softcap: float | None,
    scale: float,
    threshold: int = 0,
    seed: Tensor | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor]:
    """q (T, Hq, D), k and v (T, Hkv, D) → (T, Hq, D), zeros on rows of no sequence, and the log-sum-exp (T, Hq).

    ``threshold`` is the dropout probability in 65536ths, ``seed`` one int64. The log-sum-exp is complete only if
    ``return_lse``; it is −inf on rows of no sequence.
    """
    training = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return blocked_operator(
        q, k, v, layout.starts, layout.lengths, seed, causal, -1 if window is None else window, softcap or 0.0, scale,
        threshold, training, return_lse,
    )  # fmt: skip


@torch.library.custom_op("llm2vec_fast::attention_blocked", mutates_args=())
def blocked_operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    lengths: Tensor,
    seed: Tensor | None,
    causal: bool,
    window: int,
    softcap: float,
    scale: float,
    threshold: int,
    training: bool,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Output (T, Hq, D) and log-sum-exp (T, Hq), whole only ``with_lse``; only the first is differentiable."""
    rule = Rule.of(causal, window, softcap, scale, threshold, seed)
    return blocked_forward(q, k, v, starts, lengths, rule, training=training, with_lse=with_lse)


@blocked_operator.register_fake
def _(q, k, v, starts, lengths, seed, causal, window, softcap, scale, threshold, training, with_lse):
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=accumulator(q.dtype))


@torch.library.custom_op("llm2vec_fast::attention_blocked_backward", mutates_args=())
def blocked_backward_operator(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    starts: Tensor,
    lengths: Tensor,
    seed: Tensor | None,
    causal: bool,
    window: int,
    softcap: float,
    scale: float,
    threshold: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, in their shapes and dtype."""
    rule = Rule.of(causal, window, softcap, scale, threshold, seed)
    return blocked_backward(grad, q, k, v, out, lse, starts, lengths, rule)


@blocked_backward_operator.register_fake
def _(grad, q, k, v, out, lse, starts, lengths, seed, causal, window, softcap, scale, threshold):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, starts, lengths, seed, *rule, _, _ = inputs
    ctx.rule = rule
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output, starts, lengths, seed)


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    gradients = blocked_backward_operator(grad, *ctx.saved_tensors, *ctx.rule)
    return *gradients, None, None, None, *(None for _ in ctx.rule), None, None


blocked_operator.register_autograd(_backward, setup_context=_setup_context)
