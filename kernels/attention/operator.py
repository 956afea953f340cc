"""The Triton path as PyTorch operators: whole to torch.compile, differentiable, with shapes known beforehand.

A window below 0, a softcap of 0 and a dropout threshold of 0 mean none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import configurations


@torch.library.custom_op("llm2vec_fast::attention", mutates_args=())
def attention_operator(
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
) -> tuple[Tensor, Tensor]:
    """Output (T, Hq, D) and `configurations.sums_like`, of which the first is the log-sum-exp to base 2 (Hq, T); only
    the output is differentiable."""
    from .triton import attention_forward

    return attention_forward(q, k, v, starts, lengths, _rule(causal, window, softcap, scale, threshold, seed))


@attention_operator.register_fake
def _(q, k, v, starts, lengths, seed, causal, window, softcap, scale, threshold):
    return q.new_empty(q.shape), configurations.sums_like(q)


@torch.library.custom_op("llm2vec_fast::attention_backward", mutates_args=())
def attention_backward_operator(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    sums: Tensor,
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
    from .triton_backward import attention_backward

    rule = _rule(causal, window, softcap, scale, threshold, seed)
    return attention_backward(grad, q, k, v, out, sums, starts, lengths, rule)


@attention_backward_operator.register_fake
def _(grad, q, k, v, out, sums, starts, lengths, seed, causal, window, softcap, scale, threshold):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, starts, lengths, seed, *ctx.rule = inputs
    out, sums = output
    ctx.mark_non_differentiable(sums)
    ctx.save_for_backward(q, k, v, out, sums, starts, lengths, seed)


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    gradients = attention_backward_operator(grad, *ctx.saved_tensors, *ctx.rule)
    return *gradients, None, None, None, *(None for _ in ctx.rule)


attention_operator.register_autograd(_backward, setup_context=_setup_context)


def _rule(causal: bool, window: int, softcap: float, scale: float, threshold: int, seed: Tensor | None) -> Any:
    from .triton import Rule

    return Rule(causal, None if window < 0 else window, softcap or None, scale, threshold, seed)
