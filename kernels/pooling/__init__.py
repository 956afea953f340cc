"""One vector a text: pooling over the tokens of each sequence."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize as _unit_length

from ..dispatch import backend_for
from ..layout import SequenceLayout
from .blocked import pool_forward
from .operator import pool_direct, pool_operator
from .reference import pool_reference

__all__ = ["POOLING_MODES", "pool"]

POOLING_MODES = {
    "mean": "mean",
    "weighted_mean": "weighted_mean",
    "mean_sqrt_len": "mean_sqrt_len",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "max": "max",
    "last": "last",
    "last_token": "last",
    "eos_token": "last",
    "first": "first",
    "bos_token": "first",
}


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
        hidden: (T, d) floating-point token rows, packed, or padded and flattened; rows of no sequence are never read.
        layout: N sequences over those T rows.
        mode: "mean"; "weighted_mean" (token i of n weighs i / (1 + … + n), SGPT, https://arxiv.org/abs/2202.08904);
            "mean_sqrt_len", also called "mean_sqrt_len_tokens" (the sum over √n); "max" (of each column; the first of
            equal ones takes the gradient, and NaN is larger than any number); "last", also called "last_token" or
            "eos_token"; "first", also called "bos_token".
        skip: (N,) integers, how many leading tokens of each sequence take no part (a prompt); more than a sequence
            has leaves none, fewer than 0 is 0. Only tokens that take part are counted, in positions and in n.
        normalize: divide each row by its Euclidean length; a row of zeros stays zeros.
        backend: "auto", "reference", "blocked" or "triton" (not in float64).

    Returns:
        (N, d), float32 (float64 where ``hidden`` is), accumulated in that dtype. A sequence of which no token takes
        part gives zeros. Differentiable in ``hidden``.

    Raises:
        ValueError: an unknown mode, shapes that do not belong together, or a dtype of another kind.
        BackendUnavailableError: the backend asked for does not exist for this operation.
    """
    if mode not in POOLING_MODES:
        raise ValueError(f"pooling mode {mode!r} is unknown: choose one of {', '.join(POOLING_MODES)}")
    if hidden.ndim != 2 or hidden.shape[0] != layout.total:
        raise ValueError(f"hidden has shape {tuple(hidden.shape)}: this layout needs ({layout.total}, d)")
    if not hidden.is_floating_point():
        raise ValueError(f"hidden has dtype {hidden.dtype}: pass floating-point rows")
    if skip is not None and (
        skip.shape != layout.lengths.shape or skip.is_floating_point() or skip.dtype == torch.bool
    ):
        raise ValueError(
            f"skip has shape {tuple(skip.shape)} and dtype {skip.dtype}: pass integers of shape ({len(layout)},)"
        )
    mode = POOLING_MODES[mode]
    backends = ("reference", "blocked", "triton") if hidden.dtype != torch.float64 else ("reference", "blocked")
    choice = backend_for("pool", backend, hidden, backends)
    compiling = torch.compiler.is_compiling()
    if choice == "reference":
        pooled = pool_reference(hidden, layout, mode, skip)
    elif choice == "blocked" and not torch.is_grad_enabled() and not compiling:
        pooled, _ = pool_forward(hidden, layout.starts, layout.lengths, skip, mode, with_places=False)
    else:
        padded = layout.padded_shape is not None
        run = pool_operator if compiling else pool_direct
        pooled, _ = run(hidden, layout.starts, layout.lengths, skip, mode, padded, choice == "triton")
    return _unit_length(pooled, dim=-1) if normalize else pooled
