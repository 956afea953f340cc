"""A linear layer for inference, with what follows the product folded into it, on weights laid out for the processor."""

from __future__ import annotations

import torch
from torch import Tensor

from .blocked import PackedWeight, linear_blocked, pack_weight, packing_problem
from .reference import ACTIVATIONS, linear_reference

__all__ = ["ACTIVATIONS", "PackedWeight", "linear", "pack_weight", "packing_problem"]


def linear(
    x: Tensor,
    weight: Tensor | PackedWeight,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    multiplier: Tensor | None = None,
) -> Tensor:
    """activation(x · weightᵀ + bias) · multiplier, the elementwise part applied to the float32 accumulator.

    Args:
        x: (…, in) rows.
        weight: (out, in), or the same made ready by `pack_weight`, which is faster and has no gradient.
        bias: (out,) or None.
        activation: "silu", "gelu", "gelu_tanh" or None.
        multiplier: (…, out), the gate of a gated MLP, or None; not together with an activation.

    Returns:
        (…, out) in x's dtype.

    Raises:
        ValueError: the activation is unknown, or both an activation and a multiplier are given.
        RuntimeError: a packed weight is used where a gradient is needed.
    """
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is unknown: choose one of {', '.join(ACTIVATIONS)}, or None")
    if activation is not None and multiplier is not None:
        raise ValueError("both activation and multiplier were passed: apply one of them in a product of its own")
    if isinstance(weight, Tensor):
        return linear_reference(x, weight, bias, activation=activation, multiplier=multiplier)
    if torch.is_grad_enabled() and x.requires_grad:
        raise RuntimeError("a packed weight has no gradient: pass the plain weight, or run under torch.no_grad()")
    return linear_blocked(x, weight, bias, activation=activation, multiplier=multiplier)
