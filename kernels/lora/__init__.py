"""A frozen linear layer with a low-rank adapter, lean in what it keeps for the backward pass."""

from __future__ import annotations

from torch import Tensor

from ..dispatch import backend_for
from .blocked import lora_linear_blocked
from .reference import lora_linear_reference

__all__ = ["lora_linear"]

_ROOMS = {"reference": lora_linear_reference, "blocked": lora_linear_blocked}


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    *,
    backend: str = "auto",
) -> Tensor:
    """x · weightᵀ + bias + scaling · dropout(x) · downᵀ · upᵀ.

    The adapter's products run in x's dtype and accumulate in float32, as under autocast, while its weights may be kept
    in float32. For the backward pass it keeps x itself, which the layers that share an input keep once, rows of r
    numbers, and with dropout one byte an element of x; peft keeps a float32 copy of x a layer. Without a graph it keeps
    nothing, and gives the same bits: dropout draws the same from the same state of PyTorch's generator.

    Args:
        x: (…, in).
        weight: (out, in) in x's dtype; it is frozen: no gradient of it is formed.
        bias: (out,), frozen, or None.
        down: (r, in), the adapter's A, in any floating dtype.
        up: (out, r), its B.
        scaling: the adapter's factor, alpha / r.
        dropout_p: the share of the adapter's inputs that is dropped, from PyTorch's random generator.
        backend: "auto", "blocked", "reference".

    Returns:
        (…, out) in x's dtype; gradients of x, down and up, each in its tensor's dtype.

    Raises:
        ValueError: shapes or dtypes do not fit, the weight asks for a gradient, or dropout_p is not in [0, 1).

    Source: LoRA (Hu et al., 2021, arXiv:2106.09685).
    """
    _check(x, weight, bias, down, up, dropout_p)
    room = _ROOMS[backend_for("lora_linear", backend, x, _ROOMS)]
    return room(x, weight, bias, down, up, scaling, dropout_p)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, dropout_p: float) -> None:
    wide, out, rank = x.shape[-1], weight.shape[0], down.shape[0]
    expected = {"weight": (weight, (out, wide)), "down": (down, (rank, wide)), "up": (up, (out, rank))}
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)} where x {tuple(x.shape)} asks for {shape}")
    if weight.dtype != x.dtype:
        raise ValueError(f"weight is {weight.dtype} and x is {x.dtype}: bring them to one dtype")
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError("the layer under an adapter is frozen: call requires_grad_(False) on its weight and bias")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p={dropout_p} is not a share: give a number from 0 to below 1")
