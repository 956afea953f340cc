"""RMSNorm for autograd, and as PyTorch operators: whole to torch.compile, with shapes known beforehand.

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


def _rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, triton: bool) -> tuple[Tensor, Tensor]:
    """Normed rows (R, d), and the scale of each row (R,), which is not differentiable."""
    if not triton:
        out, scales = blocked.rms_norm_forward(x, weight, eps, offset)
        return out, scales.view(-1)
    from .triton import rms_norm_forward

    out, _, scales = rms_norm_forward(x, None, weight, eps, offset)
    return out, scales


def _add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float, triton: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Normed rows of x + residual, that sum, and the scale of each row."""
    if not triton:
        total = x + residual
        out, scales = blocked.rms_norm_forward(total, weight, eps, offset)
        return out, total, scales.view(-1)
    from .triton import rms_norm_forward

    return rms_norm_forward(x, residual, weight, eps, offset)


def _gradients(
    grad: Tensor,
    grad_total: Tensor | None,
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    offset: float,
    weight_gradient: bool,
    triton: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the rows and of the weight; the latter has no element unless ``weight_gradient``."""
    if triton:
        from .triton import rms_norm_backward
    else:
        from .blocked import rms_norm_backward
    return rms_norm_backward(grad, grad_total, x, weight, scales, offset, weight_gradient)


rms_norm_operator = torch.library.custom_op("llm2vec_fast::rms_norm", _rms_norm, mutates_args=())
add_rms_norm_operator = torch.library.custom_op("llm2vec_fast::add_rms_norm", _add_rms_norm, mutates_args=())
rms_norm_backward_operator = torch.library.custom_op("llm2vec_fast::rms_norm_backward", _gradients, mutates_args=())


@rms_norm_operator.register_fake
def _(x, weight, eps, offset, triton):
    return x.new_empty(x.shape), _fake_scales(x)


@add_rms_norm_operator.register_fake
def _(x, residual, weight, eps, offset, triton):
    return x.new_empty(x.shape), x.new_empty(x.shape), _fake_scales(x)


@rms_norm_backward_operator.register_fake
def _(grad, grad_total, x, weight, scales, offset, weight_gradient, triton):
    return x.new_empty(x.shape), weight.new_empty(x.shape[1] if weight_gradient else 0)


def _fake_scales(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, ctx.offset, ctx.triton = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, output[1])


def _backward(gradients: Callable[..., Any], ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    weight_gradient = ctx.needs_input_grad[1]
    grad_x, grad_weight = gradients(grad, None, *ctx.saved_tensors, ctx.offset, weight_gradient, ctx.triton)
    return grad_x, grad_weight if weight_gradient else None, None, None, None


def _setup_add_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, _, weight, _, ctx.offset, ctx.triton = inputs
    _, total, scales = output
    ctx.mark_non_differentiable(scales)
    ctx.save_for_backward(total, weight, scales)


def _add_backward(
    gradients: Callable[..., Any], ctx: Any, grad: Tensor, grad_total: Tensor, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    weight_gradient = ctx.needs_input_grad[2]
    grad_x, grad_weight = gradients(grad, grad_total, *ctx.saved_tensors, ctx.offset, weight_gradient, ctx.triton)
    return grad_x, grad_x, grad_weight if weight_gradient else None, None, None, None


rms_norm_operator.register_autograd(partial(_backward, rms_norm_backward_operator), setup_context=_setup_context)
add_rms_norm_operator.register_autograd(
    partial(_add_backward, rms_norm_backward_operator), setup_context=_setup_add_context
)
rms_norm_direct = direct(_rms_norm, _setup_context, partial(_backward, _gradients))
add_rms_norm_direct = direct(_add_rms_norm, _setup_add_context, partial(_add_backward, _gradients))
