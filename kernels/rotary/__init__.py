"""Rotary position embedding of queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import choose_for
from .blocked import rotate_blocked
from .reference import rotate_reference

__all__ = ["rotary"]

_WITH_GRADIENT = ("reference",)
_WITHOUT_GRADIENT = ("reference", "blocked")


def rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Turn each pair (x[i], x[i + w/2]) of the first w columns by the angle whose cosine and sine are given.

    Args:
        q: (B, Hq, S, D) queries, or (B, S, Hq, D) with ``unsqueeze_dim=2``; strided views are fine.
        k: (B, Hkv, S, D) keys, likewise.
        cos, sin: (B, S, w) with w ≤ D even, as transformers' rotary modules give them, whatever their scaling; columns
            from w on pass unturned.
        unsqueeze_dim: where ``cos`` and ``sin`` get their head dimension.
        backend: "auto", "reference" or "blocked"; where a gradient is needed, "auto" is the reference.

    Returns:
        The turned queries and keys, in their shapes and dtypes.

    Raises:
        BackendUnavailableError: the backend asked for cannot run this call.

    Source: Su et al., 2021, arXiv:2104.09864; pairs lie half a width apart, as in transformers.
    """
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, cos, sin))
    if backend == "auto" and needs_gradient:
        return rotate_reference(q, cos, sin), rotate_reference(k, cos, sin)
    implemented = _WITH_GRADIENT if needs_gradient else _WITHOUT_GRADIENT
    reference = choose_for("rotary", backend, q, implemented).backend == "reference"
    rotate = rotate_reference if reference else rotate_blocked
    return rotate(q, cos, sin), rotate(k, cos, sin)
