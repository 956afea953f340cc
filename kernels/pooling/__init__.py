"""One vector a text: pooling over the tokens of each sequence."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize as _unit_length

from ..dispatch import choose_for
from ..layout import SequenceLayout
from .blocked import pool_backward, pool_forward
from .reference import pool_reference

__all__ = ["POOLING_MODES", "pool"]

POOLING_MODES = {
    "mean": "mean",
    "weighted_mean": "weighted_mean",
    "last": "last",
    "last_token": "last",
    "eos_token": "last",
    "first": "first",
    "bos_token": "first",
}
_IMPLEMENTED = ("blocked", "reference")


def pool(
    hidden: Tensor,
    layout: SequenceLayout,
    mode: str = "mean",
    skip: Tensor | None = None,
    normalize: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Pool the token rows of each sequence into one row.

    Args:
        hidden: (T, d) token rows, packed, or padded and flattened; rows of no sequence are never read.
        layout: N sequences over those T rows.
        mode: "mean"; "weighted_mean" (token i of n weighs i / (1 + … + n), SGPT, https://arxiv.org/abs/2202.08904);
            "last", also called "last_token" or "eos_token"; "first", also called "bos_token".
        skip: (N,) integers, how many leading tokens of each sequence take no part (a prompt); more than a sequence
            has leaves none. Positions of "weighted_mean" count from the first token that takes part.
        normalize: divide each row by its Euclidean length; a row of zeros stays zeros.
        backend: "auto", "blocked" or "reference".

    Returns:
        (N, d), float32 (float64 where ``hidden`` is), accumulated in that dtype. A sequence of which no token takes
        part gives zeros. Differentiable in ``hidden``.

    Raises:
        ValueError: an unknown mode, or shapes that do not belong together.
        BackendUnavailableError: the backend asked for does not exist for this operation.
    """
    if mode not in POOLING_MODES:
        raise ValueError(f"pooling mode {mode!r} is unknown: choose one of {', '.join(POOLING_MODES)}")
    if hidden.ndim != 2 or hidden.shape[0] != layout.total:
        raise ValueError(f"hidden has shape {tuple(hidden.shape)}: this layout needs ({layout.total}, d)")
    if skip is not None and (skip.shape != layout.lengths.shape or skip.is_floating_point()):
        raise ValueError(
            f"skip has shape {tuple(skip.shape)} and dtype {skip.dtype}: pass integers of shape ({len(layout)},)"
        )
    mode = POOLING_MODES[mode]
    if choose_for("pool", backend, hidden, _IMPLEMENTED).backend == "reference":
        pooled = pool_reference(hidden, layout, mode, skip)
    else:
        pooled = _pool(hidden, layout.starts, layout.lengths, skip, mode)
    return _unit_length(pooled, dim=-1) if normalize else pooled


@torch.library.custom_op("llm2vec_fast::pool", mutates_args=())
def _pool(hidden: Tensor, starts: Tensor, lengths: Tensor, skip: Tensor | None, mode: str) -> Tensor:
    return pool_forward(hidden, starts, lengths, skip, mode)


@torch.library.custom_op("llm2vec_fast::pool_backward", mutates_args=())
def _pool_backward(
    grad: Tensor, total: int, starts: Tensor, lengths: Tensor, skip: Tensor | None, mode: str, dtype: torch.dtype
) -> Tensor:
    return pool_backward(grad, total, starts, lengths, skip, mode, dtype)


@_pool.register_fake
def _(hidden: Tensor, starts: Tensor, lengths: Tensor, skip: Tensor | None, mode: str) -> Tensor:
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return hidden.new_empty(starts.shape[0], hidden.shape[1], dtype=dtype)


@_pool_backward.register_fake
def _(
    grad: Tensor, total: int, starts: Tensor, lengths: Tensor, skip: Tensor | None, mode: str, dtype: torch.dtype
) -> Tensor:
    return grad.new_empty(total, grad.shape[1], dtype=dtype)


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    hidden, starts, lengths, skip, mode = inputs
    ctx.save_for_backward(starts, lengths, skip)
    ctx.mode, ctx.total, ctx.dtype = mode, hidden.shape[0], hidden.dtype


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
    starts, lengths, skip = ctx.saved_tensors
    return _pool_backward(grad, ctx.total, starts, lengths, skip, ctx.mode, ctx.dtype), None, None, None, None


_pool.register_autograd(_backward, setup_context=_setup_context)
