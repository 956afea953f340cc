"""Root-mean-square normalisation of rows, with the addition before it where there is one."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import backend_for
from .blocked import rms_norm_forward
from .operator import add_rms_norm_direct, add_rms_norm_operator, rms_norm_direct, rms_norm_operator
from .reference import rms_norm_reference

__all__ = ["rms_norm"]

TRITON_ROW_BYTES = 32 * 1024  # wider rows would not fit a program's registers


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None = None,
    *,
    offset: float = 0.0,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """x / √(mean(x²) + eps) · (offset + weight), each row on its own, computed in float32.

    A gradient costs no memory but one number a row beside x. The weight's gradient is summed in float32, always in the
    same order, and not at all where the weight is frozen.

    Args:
        x: (…, d) rows; float16, bfloat16, float32 or float64 (not on Triton).
        weight: (d,).
        eps: added to the mean square.
        residual: in x's shape and dtype: added to x first.
        offset: 1.0 for Gemma, whose weights are stored as their distance from one.
        backend: "auto", "reference", "blocked" or "triton" (rows of up to 32 KiB: 16,384 columns of 16 bits).

    Returns:
        (…, d) in x's dtype; with a residual that, and the sum x + residual.

    Raises:
        ValueError: the weight or the residual does not fit the rows, these have no column or are not of a
            floating-point dtype, or eps is negative.
        BackendUnavailableError: the backend asked for cannot run this call.

    Source: Zhang and Sennrich, 2019, arXiv:1910.07467.
    """
    if x.ndim == 0 or x.shape[-1] == 0 or not x.is_floating_point():
        raise ValueError(f"x is {tuple(x.shape)} {x.dtype}: pass floating-point rows of at least one column")
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, rows have {x.shape[-1]} columns: they must be equal")
    if not eps >= 0:
        raise ValueError(f"eps={eps} is not a number of 0 or more: give what is added to the mean square")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"residual is {tuple(residual.shape)} {residual.dtype}, x is {tuple(x.shape)} {x.dtype}: they must be equal"
        )
    refused = _refused(x)
    backends = ("reference", "blocked") if refused else ("reference", "blocked", "triton")
    choice = backend_for("rms_norm", backend, x, backends, refused=refused)
    compiling = torch.compiler.is_compiling()
    if choice == "reference":
        total = x if residual is None else x + residual
        out = rms_norm_reference(total, weight, eps, offset)
        return out if residual is None else (out, total)
    if choice == "blocked" and not torch.is_grad_enabled() and not compiling:
        total = x if residual is None else x + residual
        out, _ = rms_norm_forward(total, weight, eps, offset)
        return out if residual is None else (out, total)
    rows = x.reshape(-1, x.shape[-1])
    if residual is not None:
        flat = residual.reshape(rows.shape)
        run = add_rms_norm_operator if compiling else add_rms_norm_direct
        out, total, _ = run(rows, flat, weight, eps, offset, choice == "triton")
        return out.view(x.shape), total.view(x.shape)
    run = rms_norm_operator if compiling else rms_norm_direct
    out, _ = run(rows, weight, eps, offset, choice == "triton")
    return out.view(x.shape)


def _refused(x: Tensor) -> dict[str, str]:
    """Why the kernels cannot take these rows, by backend."""
    if x.dtype == torch.float64:
        return {"triton": "its kernels have no float64"}
    most = TRITON_ROW_BYTES // x.element_size()
    if x.shape[-1] > most:
        return {"triton": f"rows have {x.shape[-1]} columns: a program holds at most {most} of {x.dtype}"}
    return {}
