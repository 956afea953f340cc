"""Pooling for autograd, and as PyTorch operators: whole to torch.compile, with shapes known beforehand.

``triton`` picks the kernels, else the blocked implementation runs; ``padded``: there are rows of no sequence.
``places``: the row that each maximum is in, (N, d) int32, −1 where there is none; of other modes than "max", empty.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..direct import direct


def _pool(
    hidden: Tensor, starts: Tensor, lengths: Tensor, skip: Tensor | None, mode: str, padded: bool, triton: bool
) -> tuple[Tensor, Tensor]:
    """hidden (T, d) → (N, d), float32 or wider, and ``places``."""
    if triton:
        from .triton import pool_forward
    else:
        from .blocked import pool_forward
    return pool_forward(hidden, starts, lengths, skip, mode)


def _gradient(
    grad: Tensor,
    places: Tensor,
    total: int,
    starts: Tensor,
    lengths: Tensor,
    skip: Tensor | None,
    mode: str,
    dtype: torch.dtype,
    padded: bool,
    triton: bool,
) -> Tensor:
    """grad (N, d) → (T, d) in ``dtype``, zeros on rows that took no part."""
    if triton:
        from .triton import pool_backward
    else:
        from .blocked import pool_backward
    return pool_backward(grad, places, total, starts, lengths, skip, mode, dtype, padded)


pool_operator = torch.library.custom_op("llm2vec_fast::pool", _pool, mutates_args=())
pool_backward_operator = torch.library.custom_op("llm2vec_fast::pool_backward", _gradient, mutates_args=())


@pool_operator.register_fake
def _(hidden, starts, lengths, skip, mode, padded, triton):
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    out = hidden.new_empty(starts.shape[0], hidden.shape[1], dtype=dtype)
    return out, out.new_empty(out.shape if mode == "max" else 0, dtype=torch.int32)


@pool_backward_operator.register_fake
def _(grad, places, total, starts, lengths, skip, mode, dtype, padded, triton):
    return grad.new_empty(total, grad.shape[1], dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, starts, lengths, skip, ctx.mode, ctx.padded, ctx.triton = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], starts, lengths, skip)
    ctx.total, ctx.dtype = hidden.shape[0], hidden.dtype


def _backward(gradient: Callable[..., Tensor], ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    places, *sequences = ctx.saved_tensors
    grad_hidden = gradient(grad, places, ctx.total, *sequences, ctx.mode, ctx.dtype, ctx.padded, ctx.triton)
    return grad_hidden, None, None, None, None, None, None


pool_operator.register_autograd(partial(_backward, pool_backward_operator), setup_context=_setup_context)
pool_direct = direct(_pool, _setup_context, partial(_backward, _gradient))
