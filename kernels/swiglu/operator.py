"""The gate of a gated MLP for autograd, and as PyTorch operators: whole to torch.compile, with shapes known beforehand.

Tensors are rows (R, d); ``triton`` picks the kernels, else the blocked implementation runs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..direct import direct
from . import blocked


def _swiglu(gate: Tensor, up: Tensor, activation: str, triton: bool) -> Tensor:
    """act(gate) · up."""
    if not triton:
        return blocked.swiglu_forward(gate, up, activation)
    from .triton import swiglu_forward

    return swiglu_forward(gate, up, activation)


def _gradients(grad: Tensor, gate: Tensor, up: Tensor, activation: str, triton: bool) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up."""
    if not triton:
        return blocked.swiglu_backward(grad, gate, up, activation)
    from .triton import swiglu_backward

    return swiglu_backward(grad, gate, up, activation)


swiglu_operator = torch.library.custom_op("llm2vec_fast::swiglu", _swiglu, mutates_args=())
swiglu_backward_operator = torch.library.custom_op("llm2vec_fast::swiglu_backward", _gradients, mutates_args=())


@swiglu_operator.register_fake
def _(gate, up, activation, triton):
    return gate.new_empty(gate.shape)


@swiglu_backward_operator.register_fake
def _(grad, gate, up, activation, triton):
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, ctx.activation, ctx.triton = inputs
    ctx.save_for_backward(gate, up)


def _backward(gradients: Callable[..., Any], ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *gradients(grad, *ctx.saved_tensors, ctx.activation, ctx.triton), None, None


swiglu_operator.register_autograd(partial(_backward, swiglu_backward_operator), setup_context=_setup_context)
swiglu_direct = direct(_swiglu, _setup_context, partial(_backward, _gradients))
