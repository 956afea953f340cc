"""Rotary position embedding of queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import backend_for
from .blocked import rotate_blocked
from .operator import rotary_direct, rotary_operator
from .reference import rotate_reference

__all__ = ["rotary"]


def rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Turn each pair (x[i], x[i + w/2]) of the first w columns by the angle whose cosine and sine are given.

    Args:
        q: (B, Hq, S, D) queries, or (B, S, Hq, D) with ``unsqueeze_dim=2``; strided views are fine.
        k: (B, Hkv, S, D) keys, likewise.
        cos, sin: (B, S, w), or (1, S, w) for all, with w ≤ D even, as transformers' rotary modules give them, whatever
            their scaling; columns from w on pass unturned.
        unsqueeze_dim: 1 or 2, where ``cos`` and ``sin`` get their head dimension.
        backend: "auto", "reference", "blocked" or "triton" (not in float64). A gradient of cos or sin, which
            transformers never needs, is the reference's alone: "auto" then picks it.

    Returns:
        The turned queries and keys, in their shapes, dtypes and, but for the reference's, order in memory.

    Raises:
        ValueError: the shapes do not belong together, or q or k is not of a floating-point dtype.
        BackendUnavailableError: the backend asked for cannot run this call.

    Source: Su et al., 2021, arXiv:2104.09864; pairs lie half a width apart, as in transformers.
    """
    _check(q, k, cos, sin, unsqueeze_dim)
    if unsqueeze_dim == 2:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    turned = _rotary(q, k, cos, sin, backend)
    return tuple(x.transpose(1, 2) for x in turned) if unsqueeze_dim == 2 else turned


def _rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    backends = ("reference", "blocked", "triton") if q.dtype != torch.float64 else ("reference", "blocked")
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        backends = ("reference",)
        backend = "reference" if backend == "auto" else backend
    choice = backend_for("rotary", backend, q, backends)
    if choice == "reference":
        cos, sin = cos[:, None], sin[:, None]
        return rotate_reference(q, cos, sin), rotate_reference(k, cos, sin)
    compiling = torch.compiler.is_compiling()
    if choice == "blocked" and not torch.is_grad_enabled() and not compiling:
        cos, sin = cos[:, None], sin[:, None]
        return rotate_blocked(q, cos, sin), rotate_blocked(k, cos, sin)
    run = rotary_operator if compiling else rotary_direct
    return run(q, k, cos, sin, False, choice == "triton")


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int) -> None:
    if unsqueeze_dim not in (1, 2):
        raise ValueError(f"unsqueeze_dim={unsqueeze_dim} is neither 1 nor 2: heads come before positions or after them")
    if q.ndim != 4 or k.ndim != 4 or q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k have shapes {tuple(q.shape)} and {tuple(k.shape)}: pass (batch, heads, length, D)")
    length = q.shape[3 - unsqueeze_dim]
    if k.shape[0] != q.shape[0] or k.shape[3 - unsqueeze_dim] != length:
        raise ValueError(
            f"q and k have shapes {tuple(q.shape)} and {tuple(k.shape)}: they must be of one batch and one length"
        )
    if not (q.is_floating_point() and k.is_floating_point()):
        raise ValueError(f"q is {q.dtype} and k is {k.dtype}: pass floating-point tensors")
    if cos.shape != sin.shape or cos.ndim != 3 or cos.shape[0] not in (1, q.shape[0]) or cos.shape[1] != length:
        raise ValueError(
            f"cos and sin have shapes {tuple(cos.shape)} and {tuple(sin.shape)}: pass ({q.shape[0]} or 1, {length}, w)"
        )
    if cos.shape[2] % 2 or not 0 < cos.shape[2] <= q.shape[3]:
        raise ValueError(
            f"cos has {cos.shape[2]} columns, heads have {q.shape[3]}: pass an even number of at most that"
        )
