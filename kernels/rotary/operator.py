"""Rotary position embedding as a PyTorch operator: whole to torch.compile, and differentiable in queries and keys.

Queries and keys are (B, H, S, D), cos and sin (B or 1, S, w). The gradient goes through the transposed operator.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .blocked import like, rotate_blocked


@torch.library.custom_op("llm2vec_fast::rotary", mutates_args=())
def rotary_operator(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, transposed: bool, triton: bool
) -> tuple[Tensor, Tensor]:
    """Turned queries and keys, in the dtypes and the order in memory of those given."""
    if triton:
        from .triton import rotate

        return rotate(q, k, cos, sin, transposed)
    cos, sin = cos[:, None], sin[:, None]
    return rotate_blocked(q, cos, sin, transposed), rotate_blocked(k, cos, sin, transposed)


@rotary_operator.register_fake
def _(q, k, cos, sin, transposed, triton):
    return like(q), like(k)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, cos, sin, ctx.transposed, ctx.triton = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
    turned = rotary_operator(grad_q, grad_k, *ctx.saved_tensors, not ctx.transposed, ctx.triton)
    return *turned, None, None, None, None


rotary_operator.register_autograd(_backward, setup_context=_setup_context)
