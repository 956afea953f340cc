"""The gate of a gated MLP in plain PyTorch, and its gradients without a temporary tensor.

What a gradient needs is the two inputs; autograd through the two operations keeps a third tensor of their size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .reference import ACTIVATIONS

# Elements a block, so that what one pass writes the next finds in the cache.
BLOCK_ELEMENTS = 256 * 1024


def swiglu_forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """gate and up (R, d) → (R, d)."""
    return ACTIVATIONS[activation](gate).mul_(up)


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up (R, d)."""
    grad_gate, grad_up = gate.new_empty(gate.shape), gate.new_empty(gate.shape)
    for rows in _blocks(gate):
        slope, value = grad_gate[rows], grad_up[rows]
        torch.mul(grad[rows], up[rows], out=slope)
        if activation == "silu":
            torch.ops.aten.silu_backward.grad_input(slope, gate[rows], grad_input=slope)
            torch.ops.aten.silu.out(gate[rows], out=value)
        else:
            torch.ops.aten.gelu_backward.grad_input(slope, gate[rows], approximate="tanh", grad_input=slope)
            torch.ops.aten.gelu.out(gate[rows], approximate="tanh", out=value)
        value.mul_(grad[rows])
    return grad_gate, grad_up


def _blocks(x: Tensor) -> Iterator[slice]:
    step = max(1, BLOCK_ELEMENTS // max(1, x.shape[1]))
    return (slice(first, first + step) for first in range(0, x.shape[0], step))
