"""RMSNorm for GPUs: forward and backward each read their inputs once.

A program holds whole rows in registers. The backward pass sums the weight's gradient in float32 over the rows of each
of a few programs and then over the programs, in an order that never changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import processors, readable

TILE_ELEMENTS = 2048
ELEMENTS_A_THREAD = 16
FLOAT32_ELEMENTS_BACKWARD = 8  # with 16 Triton 3.6 spills 16 bytes
MOST_WARPS = 16  # of 64 threads, which is as many as a program may have
PROGRAMS_A_PROCESSOR = 4
# Wider rows fill the registers: their backward pass leaves to the caches what it needs for every one.
HELD_COLUMNS = tl.constexpr(8192)


@dataclass(frozen=True)
class Configuration:
    """Tile of rows and columns, and warps a program."""

    block_r: int
    block_d: int
    warps: int

    def arguments(self) -> dict[str, int]:
        """As a kernel's launch takes them, by name."""
        return {"BLOCK_R": self.block_r, "BLOCK_D": self.block_d, "num_warps": self.warps, "num_stages": 1}


@cache
def configuration(columns: int, elements: int = ELEMENTS_A_THREAD) -> Configuration:
    """How rows of so many columns are launched: short rows share a program, long ones get more threads, each so many
    elements where that takes no more than MOST_WARPS."""
    block_d = max(16, triton.next_power_of_2(columns))
    block_r = max(1, TILE_ELEMENTS // block_d)
    return Configuration(block_r, block_d, min(MOST_WARPS, max(4, block_r * block_d // (32 * elements))))


@triton.jit
def _load_rows(p_rows, stride, first, o_r, o_d, mask):
    """Rows first … as float32, zeros past the end. → [BLOCK_R, BLOCK_D]"""
    p_rows += first.to(tl.int64) * stride  # R·d can pass 2³¹
    return tl.load(p_rows + o_r[:, None] * stride + o_d[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_factor(p_weight, offset, o_d, m_d):
    """What normed rows are multiplied by. → [BLOCK_D]"""
    return tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32) + offset


@triton.jit
def _store_rows(p_rows, first, o_r, o_d, mask, b_rows, COLUMNS: tl.constexpr):
    p_rows += first.to(tl.int64) * COLUMNS
    tl.store(p_rows + o_r[:, None] * COLUMNS + o_d[None, :], b_rows.to(p_rows.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(p_x, p_residual, p_weight, p_out, p_total, p_scales, stride_x, stride_r, rows, eps, offset,
                    HAS_RESIDUAL: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_R: tl.constexpr,
                    BLOCK_D: tl.constexpr):  # fmt: skip
    """One program norms BLOCK_R rows. x (R, d) → out (R, d), the sum with the residual (R, d), scales (R,)."""
    first = tl.program_id(0) * BLOCK_R
    o_r = tl.arange(0, BLOCK_R)
    o_d = tl.arange(0, BLOCK_D)
    m_r = first + o_r < rows
    m_d = o_d < COLUMNS
    mask = m_r[:, None] & m_d[None, :]
    # [BLOCK_R, BLOCK_D]
    b_x = _load_rows(p_x, stride_x, first, o_r, o_d, mask)
    if HAS_RESIDUAL:
        b_x += _load_rows(p_residual, stride_r, first, o_r, o_d, mask)
        b_total = b_x.to(p_total.dtype.element_ty)
        _store_rows(p_total, first, o_r, o_d, mask, b_total, COLUMNS)
        b_x = b_total.to(tl.float32)  # what the next layer sees is what is normed
    # [BLOCK_R]
    b_mean = tl.sum(b_x * b_x, axis=1) / COLUMNS
    b_scale = tl.div_rn(1.0, tl.sqrt_rn(b_mean + eps))
    tl.store(p_scales + first + o_r, b_scale, mask=m_r)
    # [BLOCK_D]
    b_factor = _load_factor(p_weight, offset, o_d, m_d)
    _store_rows(p_out, first, o_r, o_d, mask, b_x * b_scale[:, None] * b_factor[None, :], COLUMNS)


@triton.jit(do_not_specialize=["rows", "steps"])
def _backward_kernel(p_grad, p_grad_total, p_x, p_weight, p_scales, p_grad_x, p_partial,
                     stride_g, stride_t, stride_x, rows, steps, offset,
                     HAS_TOTAL: tl.constexpr, WEIGHT_GRADIENT: tl.constexpr, COLUMNS: tl.constexpr,
                     BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """One program takes ``steps`` times BLOCK_R rows, and writes its share of the weight's gradient (programs, d)."""
    o_r = tl.arange(0, BLOCK_R)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < COLUMNS
    p_sum = p_partial + tl.program_id(0) * COLUMNS + o_d
    HELD: tl.constexpr = BLOCK_D <= HELD_COLUMNS
    # [BLOCK_D]
    if HELD:
        b_factor = _load_factor(p_weight, offset, o_d, m_d)
        b_sum = tl.zeros((BLOCK_R, BLOCK_D), dtype=tl.float32)
    for step in range(0, steps):
        first = (tl.program_id(0) * steps + step) * BLOCK_R
        m_r = first + o_r < rows
        mask = m_r[:, None] & m_d[None, :]
        # [BLOCK_R, BLOCK_D]
        b_grad = _load_rows(p_grad, stride_g, first, o_r, o_d, mask)
        b_scale = tl.load(p_scales + first + o_r, mask=m_r, other=0.0)[:, None]
        b_normal = _load_rows(p_x, stride_x, first, o_r, o_d, mask) * b_scale
        if WEIGHT_GRADIENT:
            if HELD:
                b_sum += b_grad * b_normal
            else:
                b_so_far = tl.load(p_sum, mask=m_d & (step > 0), other=0.0)
                tl.store(p_sum, b_so_far + tl.sum(b_grad * b_normal, axis=0), mask=m_d)
        if not HELD:
            b_factor = _load_factor(p_weight, offset, o_d, m_d)
        b_grad *= b_factor[None, :]
        b_mean = tl.sum(b_grad * b_normal, axis=1) / COLUMNS
        b_out = b_scale * (b_grad - b_normal * b_mean[:, None])
        if HAS_TOTAL:
            b_out += _load_rows(p_grad_total, stride_t, first, o_r, o_d, mask)
        _store_rows(p_grad_x, first, o_r, o_d, mask, b_out, COLUMNS)
    if WEIGHT_GRADIENT and HELD:
        tl.store(p_sum, tl.sum(b_sum, axis=0), mask=m_d)


def rms_norm_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Normed rows, the sum with the residual (no element without one), and the scale of each row."""
    x, residual = readable(x), None if residual is None else readable(residual)
    out, total = x.new_empty(x.shape), x.new_empty(0 if residual is None else x.shape)
    scales = x.new_empty(x.shape[0], dtype=torch.float32)
    if x.numel():
        config = configuration(x.shape[1])
        _forward_kernel[(triton.cdiv(x.shape[0], config.block_r),)](
            **forward_arguments(x, residual, weight, out, total, scales, eps, offset)
        )
    return out, total, scales


def rms_norm_backward(
    grad: Tensor,
    grad_total: Tensor | None,
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    offset: float,
    weight_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the rows and of the weight; the latter has no element unless ``weight_gradient``."""
    grad, x = readable(grad), readable(x)
    grad_total = None if grad_total is None else readable(grad_total)
    grad_x = x.new_empty(x.shape)
    tiles = triton.cdiv(x.shape[0], configuration(x.shape[1]).block_r) if x.numel() else 0
    programs = min(tiles, PROGRAMS_A_PROCESSOR * processors(x.device)) if weight_gradient else tiles
    steps = triton.cdiv(tiles, max(1, programs))
    programs = triton.cdiv(tiles, max(1, steps))
    partial = x.new_empty((programs if weight_gradient else 0, x.shape[1]), dtype=torch.float32)
    if tiles:
        _backward_kernel[(programs,)](
            **backward_arguments(grad, grad_total, x, weight, scales, grad_x, partial, steps, offset, weight_gradient)
        )
    return grad_x, partial.sum(0).to(weight.dtype) if weight_gradient else weight.new_empty(0)


def forward_arguments(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    out: Tensor,
    total: Tensor,
    scales: Tensor,
    eps: float,
    offset: float,
) -> dict[str, Any]:
    """What `_forward_kernel` is launched with, by name; the ahead-of-time report compiles the same."""
    return {
        "p_x": x, "p_residual": residual, "p_weight": weight, "p_out": out, "p_total": total, "p_scales": scales,
        "stride_x": x.stride(0), "stride_r": 0 if residual is None else residual.stride(0), "rows": x.shape[0],
        "eps": float(eps), "offset": float(offset), "HAS_RESIDUAL": residual is not None, "COLUMNS": x.shape[1],
        **configuration(x.shape[1]).arguments(),
    }  # fmt: skip


def backward_arguments(
    grad: Tensor,
    grad_total: Tensor | None,
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    grad_x: Tensor,
    partial: Tensor,
    steps: int,
    offset: float,
    weight_gradient: bool,
) -> dict[str, Any]:
    """What `_backward_kernel` is launched with, by name."""
    elements = FLOAT32_ELEMENTS_BACKWARD if x.dtype == torch.float32 else ELEMENTS_A_THREAD
    return {
        "p_grad": grad, "p_grad_total": grad_total, "p_x": x, "p_weight": weight, "p_scales": scales,
        "p_grad_x": grad_x, "p_partial": partial, "stride_g": grad.stride(0),
        "stride_t": 0 if grad_total is None else grad_total.stride(0), "stride_x": x.stride(0), "rows": x.shape[0],
        "steps": steps, "offset": float(offset), "HAS_TOTAL": grad_total is not None,
        "WEIGHT_GRADIENT": weight_gradient, "COLUMNS": x.shape[1],
        **configuration(x.shape[1], elements).arguments(),
    }  # fmt: skip
