"""The gate of a gated MLP: an activation of one projection times another."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import backend_for
from .blocked import swiglu_forward
from .operator import swiglu_direct, swiglu_operator
from .reference import ACTIVATIONS, swiglu_reference

__all__ = ["ACTIVATIONS", "swiglu"]


def swiglu(gate: Tensor, up: Tensor, activation: str = "silu", *, backend: str = "auto") -> Tensor:
    """activation(gate) · up, computed in float32 (on "blocked" with one rounding between the two).

    A gradient keeps gate and up alone, and computes the activation again.

    Args:
        gate, up: (…, d); float16, bfloat16, float32 or float64 (not on Triton). Halves of one tensor, as
            ``chunk(2, -1)`` gives them, are read in place.
        activation: "silu" or "gelu_tanh".
        backend: "auto", "reference", "blocked" or "triton".

    Returns:
        (…, d) in their dtype.

    Raises:
        ValueError: the activation is unknown, gate and up differ in shape or dtype, have no column, or are not of a
            floating-point dtype.
        BackendUnavailableError: the backend asked for cannot run this call.

    Source: Shazeer, 2020, arXiv:2002.05202.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is unknown: choose one of {', '.join(ACTIVATIONS)}")
    if gate.shape != up.shape or gate.dtype != up.dtype or gate.ndim == 0:
        raise ValueError(
            f"gate is {tuple(gate.shape)} {gate.dtype}, up is {tuple(up.shape)} {up.dtype}: they must be equal"
        )
    if gate.shape[-1] == 0 or not gate.is_floating_point():
        raise ValueError(f"gate is {tuple(gate.shape)} {gate.dtype}: pass floating-point rows of at least one column")
    backends = ("reference", "blocked", "triton") if gate.dtype != torch.float64 else ("reference", "blocked")
    choice = backend_for("swiglu", backend, gate, backends)
    if choice == "reference":
        return swiglu_reference(gate, up, activation)
    compiling = torch.compiler.is_compiling()
    if choice == "blocked" and not torch.is_grad_enabled() and not compiling:
        return swiglu_forward(gate, up, activation)
    rows = gate.reshape(-1, gate.shape[-1]), up.reshape(-1, up.shape[-1])
    run = swiglu_operator if compiling else swiglu_direct
    return run(*rows, activation, choice == "triton").view(gate.shape)
