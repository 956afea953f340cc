"""The gate of a gated MLP for GPUs: each input is read once, each output written once, forward and backward."""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..launch import readable

BLOCK_R, BLOCK_D, WARPS = 4, 512, 4
# gelu_tanh(x) = ½x · (1 + tanh(√(2/π) · (x + CUBIC · x³)))
FACTOR = tl.constexpr(2 * math.sqrt(2 / math.pi))
CUBIC = tl.constexpr(0.044715)


@triton.jit
def _tile(stride, rows, COLUMNS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """Offsets and mask of this program's tile in rows of the given stride. [BLOCK_R, BLOCK_D] each"""
    first = tl.program_id(0) * BLOCK_R
    o_r = tl.arange(0, BLOCK_R)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = (first + o_r < rows)[:, None] & (o_d < COLUMNS)[None, :]
    return first.to(tl.int64) * stride, o_r[:, None] * stride + o_d[None, :], mask


@triton.jit
def _load(p_rows, stride, rows, COLUMNS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    first, o_tile, mask = _tile(stride, rows, COLUMNS, BLOCK_R, BLOCK_D)
    return tl.load(p_rows + first + o_tile, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(p_rows, b_rows, rows, COLUMNS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    first, o_tile, mask = _tile(COLUMNS, rows, COLUMNS, BLOCK_R, BLOCK_D)
    tl.store(p_rows + first + o_tile, b_rows.to(p_rows.dtype.element_ty), mask=mask)


@triton.jit
def _share_and_inner_slope(b_gate, ACTIVATION: tl.constexpr):
    """Both activations are x · σ(z(x)), as ½(1 + tanh y) = σ(2y): σ(z), and dz/dx."""
    if ACTIVATION == "silu":
        b_z = b_gate
        b_slope = 1.0
    else:
        b_cubic = CUBIC * b_gate * b_gate
        b_z = FACTOR * b_gate * (1.0 + b_cubic)
        b_slope = FACTOR * (1.0 + 3.0 * b_cubic)
    return tl.sigmoid(b_z), b_slope


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(p_gate, p_up, p_out, stride_g, stride_u, rows, ACTIVATION: tl.constexpr, COLUMNS: tl.constexpr,
                    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """One program: one tile. gate and up (R, d) → out (R, d)."""
    # [BLOCK_R, BLOCK_D]
    b_gate = _load(p_gate, stride_g, rows, COLUMNS, BLOCK_R, BLOCK_D)
    b_up = _load(p_up, stride_u, rows, COLUMNS, BLOCK_R, BLOCK_D)
    b_share, _ = _share_and_inner_slope(b_gate, ACTIVATION)
    _store(p_out, b_gate * b_share * b_up, rows, COLUMNS, BLOCK_R, BLOCK_D)


@triton.jit(do_not_specialize=["rows"])
def _backward_kernel(p_grad, p_gate, p_up, p_grad_gate, p_grad_up, stride_o, stride_g, stride_u, rows,
                     ACTIVATION: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_R: tl.constexpr,
                     BLOCK_D: tl.constexpr):  # fmt: skip
    """One program: one tile of both gradients."""
    # [BLOCK_R, BLOCK_D]
    b_grad = _load(p_grad, stride_o, rows, COLUMNS, BLOCK_R, BLOCK_D)
    b_gate = _load(p_gate, stride_g, rows, COLUMNS, BLOCK_R, BLOCK_D)
    b_up = _load(p_up, stride_u, rows, COLUMNS, BLOCK_R, BLOCK_D)
    b_share, b_slope = _share_and_inner_slope(b_gate, ACTIVATION)
    b_value = b_gate * b_share
    _store(p_grad_up, b_grad * b_value, rows, COLUMNS, BLOCK_R, BLOCK_D)
    b_slope = b_share + b_value * (1.0 - b_share) * b_slope
    _store(p_grad_gate, b_grad * b_up * b_slope, rows, COLUMNS, BLOCK_R, BLOCK_D)


def swiglu_forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """gate and up (R, d) → (R, d)."""
    gate, up = readable(gate), readable(up)
    out = gate.new_empty(gate.shape)
    if out.numel():
        _forward_kernel[_grid(gate)](**forward_arguments(gate, up, out, activation))
    return out


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up (R, d)."""
    grad, gate, up = readable(grad), readable(gate), readable(up)
    grad_gate, grad_up = gate.new_empty(gate.shape), gate.new_empty(gate.shape)
    if gate.numel():
        _backward_kernel[_grid(gate)](**backward_arguments(grad, gate, up, grad_gate, grad_up, activation))
    return grad_gate, grad_up


def forward_arguments(gate: Tensor, up: Tensor, out: Tensor, activation: str) -> dict[str, Any]:
    """What `_forward_kernel` is launched with, by name; the ahead-of-time report compiles the same."""
    return {
        "p_gate": gate, "p_up": up, "p_out": out, "stride_g": gate.stride(0), "stride_u": up.stride(0),
        **_shared_arguments(gate, activation),
    }  # fmt: skip


def backward_arguments(
    grad: Tensor, gate: Tensor, up: Tensor, grad_gate: Tensor, grad_up: Tensor, activation: str
) -> dict[str, Any]:
    """What `_backward_kernel` is launched with, by name."""
    return {
        "p_grad": grad, "p_gate": gate, "p_up": up, "p_grad_gate": grad_gate, "p_grad_up": grad_up,
        "stride_o": grad.stride(0), "stride_g": gate.stride(0), "stride_u": up.stride(0),
        **_shared_arguments(gate, activation),
    }  # fmt: skip


def _shared_arguments(gate: Tensor, activation: str) -> dict[str, Any]:
    return {
        "rows": gate.shape[0], "ACTIVATION": activation, "COLUMNS": gate.shape[1], "BLOCK_R": BLOCK_R,
        "BLOCK_D": BLOCK_D, "num_warps": WARPS, "num_stages": 1,
    }  # fmt: skip


def _grid(x: Tensor) -> tuple[int, int]:
    return triton.cdiv(x.shape[0], BLOCK_R), triton.cdiv(x.shape[1], BLOCK_D)
