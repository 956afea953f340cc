"""Root-mean-square normalisation of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import choose_for
from .blocked import rms_norm_blocked
from .reference import rms_norm_reference

__all__ = ["rms_norm"]

_WITH_GRADIENT = ("reference",)
_WITHOUT_GRADIENT = ("reference", "blocked")


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0, backend: str = "auto") -> Tensor:
    """x / √(mean(x²) + eps) · (offset + weight), each row on its own, computed in float32.

    Args:
        x: (…, d) rows; float16, bfloat16, float32 or float64.
        weight: (d,).
        eps: added to the mean square.
        offset: 1.0 for Gemma, whose weights are stored as their distance from one.
        backend: "auto", "reference" or "blocked"; where a gradient is needed, "auto" is the reference.

    Returns:
        (…, d) in x's dtype.

    Raises:
        ValueError: the weight does not fit the rows.
        BackendUnavailableError: the backend asked for cannot run this call.

    Source: Zhang and Sennrich, 2019, arXiv:1910.07467.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, rows have {x.shape[-1]} columns: they must be equal")
    needs_gradient = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if backend == "auto" and needs_gradient:
        return rms_norm_reference(x, weight, eps, offset)
    implemented = _WITH_GRADIENT if needs_gradient else _WITHOUT_GRADIENT
    if choose_for("rms_norm", backend, x, implemented).backend == "reference":
        return rms_norm_reference(x, weight, eps, offset)
    return rms_norm_blocked(x, weight, eps, offset)
