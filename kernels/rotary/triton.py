"""Rotary position embedding for GPUs: one launch turns queries and keys, each read and written once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .blocked import like

TILE_ELEMENTS = 2048  # eight a thread of an AMD GPU, whose warps have 64: 16 bytes an access
WARPS = 4
# Heads that share what a program loads of cos and sin; more would leave short batches with few programs.
HEADS_A_PROGRAM = 4


@dataclass(frozen=True)
class Configuration:
    """Tile of positions, half a turned head and the unturned rest; heads a program."""

    block_s: int
    block_h: int
    block_e: int

    def arguments(self) -> dict[str, int]:
        """As a kernel's launch takes them, by name."""
        return {
            "BLOCK_S": self.block_s, "BLOCK_H": self.block_h, "BLOCK_E": self.block_e, "HEADS": HEADS_A_PROGRAM,
            "num_warps": WARPS, "num_stages": 1,
        }  # fmt: skip


@cache
def configuration(head_dim: int, width: int) -> Configuration:
    """How heads of ``head_dim`` columns, of which ``width`` are turned, are launched."""
    block_h = max(1, triton.next_power_of_2(width // 2))
    rest = head_dim - width
    return Configuration(max(1, TILE_ELEMENTS // block_h), block_h, triton.next_power_of_2(rest) if rest else 0)


@triton.jit
def _turn_heads(p_x, p_out, stride_xh, stride_xs, stride_oh, stride_os, first_head, heads, o_s, m_s,
                b_cos_1, b_cos_2, b_sin_1, b_sin_2, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
                HEADS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_E: tl.constexpr):  # fmt: skip
    """Turn some heads of a block of positions. Pointers stand at the block's first position."""
    o_h = tl.arange(0, BLOCK_H)
    mask = m_s[:, None] & (o_h < WIDTH // 2)[None, :]
    for head in range(first_head, tl.minimum(first_head + HEADS, heads)):
        wide = head + tl.full((), 0, tl.int64)
        p_head = p_x + wide * stride_xh
        p_target = p_out + wide * stride_oh
        o_x = o_s[:, None] * stride_xs + o_h[None, :]
        o_out = o_s[:, None] * stride_os + o_h[None, :]
        # [BLOCK_S, BLOCK_H]
        b_1 = tl.load(p_head + o_x, mask=mask, other=0.0).to(tl.float32)
        b_2 = tl.load(p_head + WIDTH // 2 + o_x, mask=mask, other=0.0).to(tl.float32)
        b_out_1 = b_1 * b_cos_1 - b_2 * b_sin_1
        b_out_2 = b_2 * b_cos_2 + b_1 * b_sin_2
        tl.store(p_target + o_out, b_out_1.to(p_out.dtype.element_ty), mask=mask)
        tl.store(p_target + WIDTH // 2 + o_out, b_out_2.to(p_out.dtype.element_ty), mask=mask)
        if WIDTH < HEAD_DIM:
            o_e = tl.arange(0, BLOCK_E)
            m_e = m_s[:, None] & (o_e < HEAD_DIM - WIDTH)[None, :]
            # [BLOCK_S, BLOCK_E]
            b_rest = tl.load(p_head + WIDTH + o_s[:, None] * stride_xs + o_e[None, :], mask=m_e)
            tl.store(p_target + WIDTH + o_s[:, None] * stride_os + o_e[None, :], b_rest, mask=m_e)


@triton.jit(do_not_specialize=["length"])
def _rotary_kernel(p_q, p_k, p_cos, p_sin, p_out_q, p_out_k,
                   stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_cb, stride_cs,
                   stride_nb, stride_ns, stride_rb, stride_rh, stride_rs, stride_tb, stride_th, stride_ts, length,
                   Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, TRANSPOSED: tl.constexpr, HEAD_DIM: tl.constexpr,
                   WIDTH: tl.constexpr, HEADS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr,
                   BLOCK_E: tl.constexpr):  # fmt: skip
    """One program: a block of positions of one sequence, and a few heads of the queries or of the keys."""
    blocks = tl.cdiv(length, BLOCK_S)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    position = tl.program_id(0) % blocks * BLOCK_S
    o_s = tl.arange(0, BLOCK_S)
    m_s = position + o_s < length
    position = position.to(tl.int64)
    o_h = tl.arange(0, BLOCK_H)
    mask = m_s[:, None] & (o_h < WIDTH // 2)[None, :]
    p_cos += batch * stride_cb + position * stride_cs
    p_sin += batch * stride_nb + position * stride_ns
    o_cos = o_s[:, None] * stride_cs + o_h[None, :]
    o_sin = o_s[:, None] * stride_ns + o_h[None, :]
    # [BLOCK_S, BLOCK_H]
    b_cos_1 = tl.load(p_cos + o_cos, mask=mask, other=0.0).to(tl.float32)
    b_cos_2 = tl.load(p_cos + WIDTH // 2 + o_cos, mask=mask, other=0.0).to(tl.float32)
    b_sin_1 = tl.load(p_sin + o_sin, mask=mask, other=0.0).to(tl.float32)
    b_sin_2 = tl.load(p_sin + WIDTH // 2 + o_sin, mask=mask, other=0.0).to(tl.float32)
    if TRANSPOSED:
        b_sin_1, b_sin_2 = -b_sin_2, -b_sin_1
    group = tl.program_id(1)
    q_groups = (Q_HEADS + HEADS - 1) // HEADS
    if group < q_groups:
        _turn_heads(
            p_q + batch * stride_qb + position * stride_qs, p_out_q + batch * stride_rb + position * stride_rs,
            stride_qh, stride_qs, stride_rh, stride_rs, group * HEADS, Q_HEADS, o_s, m_s,
            b_cos_1, b_cos_2, b_sin_1, b_sin_2, HEAD_DIM, WIDTH, HEADS, BLOCK_H, BLOCK_E)  # fmt: skip
    else:
        _turn_heads(
            p_k + batch * stride_kb + position * stride_ks, p_out_k + batch * stride_tb + position * stride_ts,
            stride_kh, stride_ks, stride_th, stride_ts, (group - q_groups) * HEADS, K_HEADS, o_s, m_s,
            b_cos_1, b_cos_2, b_sin_1, b_sin_2, HEAD_DIM, WIDTH, HEADS, BLOCK_H, BLOCK_E)  # fmt: skip


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    """q (B, Hq, S, D), k (B, Hkv, S, D), cos and sin (B or 1, S, w) → turned queries and keys."""
    out_q, out_k = like(q), like(k)
    if q.numel() + k.numel() > 0:
        q, k, cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, cos, sin))
        arguments = rotary_arguments(q, k, cos, sin, out_q, out_k, transposed)
        blocks = triton.cdiv(q.shape[2], arguments["BLOCK_S"])
        groups = sum(triton.cdiv(x.shape[1], HEADS_A_PROGRAM) for x in (q, k))
        _rotary_kernel[(q.shape[0] * blocks, groups)](**arguments)
    return out_q, out_k


def rotary_arguments(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, out_q: Tensor, out_k: Tensor, transposed: bool
) -> dict[str, Any]:
    """What `_rotary_kernel` is launched with, by name; the ahead-of-time report compiles the same."""
    return {
        "p_q": q, "p_k": k, "p_cos": cos, "p_sin": sin, "p_out_q": out_q, "p_out_k": out_k,
        **_strides(q=q, k=k, r=out_q, t=out_k),
        "stride_cb": cos.stride(0) if cos.shape[0] > 1 else 0, "stride_cs": cos.stride(1),
        "stride_nb": sin.stride(0) if sin.shape[0] > 1 else 0, "stride_ns": sin.stride(1),
        "length": q.shape[2], "Q_HEADS": q.shape[1], "K_HEADS": k.shape[1], "TRANSPOSED": transposed,
        "HEAD_DIM": q.shape[3], "WIDTH": cos.shape[2], **configuration(q.shape[3], cos.shape[2]).arguments(),
    }  # fmt: skip


def _strides(**tensors: Tensor) -> dict[str, int]:
    """stride_xb, stride_xh and stride_xs, of a batch, a head and a position, for every (B, H, S, D) passed as x=…"""
    return {f"stride_{name}{kind}": x.stride(i) for name, x in tensors.items() for i, kind in enumerate("bhs")}
