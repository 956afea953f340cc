"""The gate of a gated MLP in plain PyTorch, and its gradients without a temporary tensor.

What a gradient needs is the two inputs; autograd through the two operations keeps a third tensor of their size, and
has one pass less to make, the activation's. Passes are over whole tensors: their arithmetic is what takes the time,
and blocks that fit a cache, as measured, cost more in calls than they save.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import ACTIVATIONS


def swiglu_forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """gate and up (R, d) → (R, d)."""
    return ACTIVATIONS[activation](gate).mul_(up)


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up (R, d)."""
    grad_gate, grad_up = gate.new_empty(gate.shape), gate.new_empty(gate.shape)
    torch.mul(grad, up, out=grad_gate)
    if activation == "silu":
        torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
        torch.ops.aten.silu.out(gate, out=grad_up)
    else:
        torch.ops.aten.gelu_backward.grad_input(grad_gate, gate, approximate="tanh", grad_input=grad_gate)
        torch.ops.aten.gelu.out(gate, approximate="tanh", out=grad_up)
    return grad_gate, grad_up.mul_(grad)
