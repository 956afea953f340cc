"""The gate of a gated MLP as PyTorch operators: whole to torch.compile, differentiable, with shapes known beforehand.

Tensors are rows (R, d); ``triton`` picks the kernels, else the blocked implementation runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import blocked


@torch.library.custom_op("llm2vec_fast::swiglu", mutates_args=())
def swiglu_operator(gate: Tensor, up: Tensor, activation: str, triton: bool) -> Tensor:
    """act(gate) · up."""
    if not triton:
        return blocked.swiglu_forward(gate, up, activation)
    from .triton import swiglu_forward

    return swiglu_forward(gate, up, activation)


@torch.library.custom_op("llm2vec_fast::swiglu_backward", mutates_args=())
def swiglu_backward_operator(
    grad: Tensor, gate: Tensor, up: Tensor, activation: str, triton: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up."""
    if triton:
        from .triton import swiglu_backward
    else:
        from .blocked import swiglu_backward
    return swiglu_backward(grad, gate, up, activation)


@swiglu_operator.register_fake
def _(gate, up, activation, triton):
    return gate.new_empty(gate.shape)


@swiglu_backward_operator.register_fake
def _(grad, gate, up, activation, triton):
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, ctx.activation, ctx.triton = inputs
    ctx.save_for_backward(gate, up)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *swiglu_backward_operator(grad, *ctx.saved_tensors, ctx.activation, ctx.triton), None, None


swiglu_operator.register_autograd(_backward, setup_context=_setup_context)
