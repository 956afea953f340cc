"""Rotary position embedding for autograd, and as a PyTorch operator: whole to torch.compile.

Queries and keys are (B, H, S, D), cos and sin (B or 1, S, w). The gradient, of queries and
keys alone, goes through the transposed operator.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..direct import direct
from .blocked import like, rotate_blocked


def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, transposed: bool, triton: bool) -> tuple[Tensor, Tensor]:
    """Turned queries and keys, in the dtypes and the order in memory of those given."""
    if triton:
        from .triton import rotate

        return rotate(q, k, cos, sin, transposed)
    cos, sin = cos[:, None], sin[:, None]
    return rotate_blocked(q, cos, sin, transposed), rotate_blocked(k, cos, sin, transposed)


rotary_operator = torch.library.custom_op("llm2vec_fast::rotary", _rotate, mutates_args=())


@rotary_operator.register_fake
def _(q, k, cos, sin, transposed, triton):
    return like(q), like(k)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, cos, sin, ctx.transposed, ctx.triton = inputs
    ctx.save_for_backward(cos, sin)


def _backward(rotate: Callable[..., Any], ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
    turned = rotate(grad_q, grad_k, *ctx.saved_tensors, not ctx.transposed, ctx.triton)
    return *turned, None, None, None, None


rotary_operator.register_autograd(partial(_backward, rotary_operator), setup_context=_setup_context)
rotary_direct = direct(_rotate, _setup_context, partial(_backward, _rotate))
