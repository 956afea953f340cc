"""Bidirectional flash attention for GPUs, over packed and padded batches alike.

After FlashAttention-2 (Dao, 2023, arXiv:2307.08691): one program holds a tile of queries of one sequence and head,
walks over the keys, and keeps a running maximum and sum. What differs: the tile table launches exactly the programs
that have work; the window is symmetric; tiles that every query of the program sees run in a loop without masks, only
the others (the tail, the edges of a window or of the causal triangle) are masked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tiles import FIELDS, TileTable, tile_table
from . import configurations, dropout

LOG2_E = tl.constexpr(1.4426950408889634)
DROPOUT_ROUNDS = tl.constexpr(dropout.ROUNDS)
# A point that float32 holds exactly, as it does (to 1e-9) its tanh.
MIDDLE = tl.constexpr(0.783203125)
TANH_MIDDLE = tl.constexpr(0.6545413742720325)
TILE_FIELDS = tl.constexpr(FIELDS)
# A running maximum that starts finite never meets −inf − −inf, so a row whose first tiles are all masked needs no care.
LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def _tanh(x, PRECISE: tl.constexpr):
    """tanh from exp2: Triton's portable language has none. Below 1.2 the formula cancels, which float32 would show."""
    size = tl.abs(x)
    b_tanh = 1.0 - 2.0 / (tl.exp2(size * (2.0 * LOG2_E)) + 1.0)
    if PRECISE:
        # The Taylor series to h¹³ on |h| < 0.4, where its remainder is under 4e-9 of the value; 0.4 … 1.2 are reached
        # from the middle by the addition theorem.
        b_h = tl.where(size < 0.4, size, size - MIDDLE)
        square = b_h * b_h
        b_series = square * (21844.0 / 6081075.0) - 1382.0 / 155925.0
        b_series = b_series * square + 62.0 / 2835.0
        b_series = b_series * square - 17.0 / 315.0
        b_series = b_series * square + 2.0 / 15.0
        b_series = b_series * square - 1.0 / 3.0
        b_series = b_series * square * b_h + b_h
        b_middle = TANH_MIDDLE + (1.0 - TANH_MIDDLE * TANH_MIDDLE) * b_series / (1.0 + TANH_MIDDLE * b_series)
        b_tanh = tl.where(size < 1.2, tl.where(size < 0.4, b_series, b_middle), b_tanh)
    return tl.where(x < 0, -b_tanh, b_tanh)


@triton.jit
def _scores(b_q, b_k, scale, softcap, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    """Logits before the factor of `_exponent_scale`: q·kᵀ, or capped. b_q [BQ, BD], b_k [BK, BD] → [BQ, BK]."""
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    if HAS_SOFTCAP:
        b_s = _tanh(b_s * (scale / softcap), b_q.dtype == tl.float32)
    return b_s


@triton.jit
def _exponent_scale(scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """The one factor from `_scores` to a power of two: the scale (or the cap) folded with log2 e."""
    if HAS_SOFTCAP:
        return softcap * LOG2_E
    return scale * LOG2_E


@triton.jit
def _visible(o_q, o_k, length, window, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """Which keys each query attends to, from positions within the sequence. → [BQ, BK] bool."""
    m_s = (o_k < length)[None, :] & (o_q >= 0)[:, None]
    distance = o_q[:, None] - o_k[None, :]
    if CAUSAL:
        m_s = m_s & (distance >= 0)
    if HAS_WINDOW:
        m_s = m_s & (distance <= window) & (distance >= -window)
    return m_s


@triton.jit
def _kept(seed, threshold, sequence, head, o_q, first_k, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """Which weights dropout keeps, as `dropout.Dropout.factors` defines it: eight keys a counter. → [BQ, BK] bool."""
    o_word = first_k // 8 + tl.arange(0, BLOCK_K // 8)
    zero = o_q[:, None] * 0 + o_word[None, :] * 0
    # [BLOCK_Q, BLOCK_K // 8]
    b_0, b_1, b_2, b_3 = tl.philox(seed, o_q[:, None] + zero, o_word[None, :] + zero, head.to(tl.int32) + zero,
                                   sequence + zero, DROPOUT_ROUNDS)  # fmt: skip
    # Words lie 0, 1, 2, 3 along the keys; each gives its low, then its high half.
    b_words = tl.join(tl.join(b_0, b_2), tl.join(b_1, b_3))
    m_kept = tl.join((b_words & 0xFFFF) >= threshold, (b_words >> 16) >= threshold)
    return tl.reshape(m_kept, [BLOCK_Q, BLOCK_K])


@triton.jit
def _key_range(first_q, length, window, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr,
               HAS_WINDOW: tl.constexpr):  # fmt: skip
    """Keys that a tile of queries needs: [low, high), of which [full_low, full_high) need no mask. Multiples of BLOCK_K
    but for high."""
    last_q = tl.minimum(first_q + BLOCK_Q, length) - 1
    low = 0
    high = length
    full_low = 0
    full_high = length
    if CAUSAL:
        high = last_q + 1
        full_high = first_q + 1
    if HAS_WINDOW:
        low = tl.maximum(first_q - window, 0) // BLOCK_K * BLOCK_K
        full_low = tl.cdiv(tl.maximum(last_q - window, 0), BLOCK_K) * BLOCK_K
        high = tl.minimum(high, last_q + window + 1)
        full_high = tl.minimum(full_high, first_q + window + 1)
        full_low = tl.minimum(full_low, tl.cdiv(high, BLOCK_K) * BLOCK_K)
    full_high = tl.maximum(full_high // BLOCK_K * BLOCK_K, full_low)
    return low, full_low, full_high, high


@triton.jit
def _load_rows(p_rows, stride, o_row, o_d, m_row, ROWS_MASKED: tl.constexpr, HEAD_DIM: tl.constexpr,
               BLOCK_D: tl.constexpr):  # fmt: skip
    """A tile of rows, zeros where masked; the masks that cannot matter are left out. → [rows, BLOCK_D]"""
    p_tile = p_rows + o_row[:, None] * stride + o_d[None, :]
    if HEAD_DIM < BLOCK_D:
        m_tile = (o_d < HEAD_DIM)[None, :]
        if ROWS_MASKED:
            m_tile = m_tile & m_row[:, None]
        return tl.load(p_tile, mask=m_tile, other=0.0)
    if ROWS_MASKED:
        return tl.load(p_tile, mask=m_row[:, None], other=0.0)
    return tl.load(p_tile)


@triton.jit
def _attend(b_acc, b_sum, b_max, b_q, p_k, p_v, stride_k, stride_v, first_k, o_q, o_d,
            length, window, scale, softcap, random,
            MASKED: tl.constexpr, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
            HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr,
            BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Add the keys first_k … first_k + BLOCK_K to the running softmax. p_k, p_v point at the sequence's first row."""
    o_k = tl.arange(0, BLOCK_K)
    m_k = first_k + o_k < length
    # The tile's base in int64, offsets within it in int32: fewer registers than pointers carried through the loop.
    row = tl.to_tensor(first_k).to(tl.int64)
    # [BLOCK_K, BLOCK_D]
    b_k = _load_rows(p_k + row * stride_k, stride_k, o_k, o_d, m_k, MASKED, HEAD_DIM, BLOCK_D)
    # [BLOCK_Q, BLOCK_K]
    b_s = _scores(b_q, b_k, scale, softcap, HAS_SOFTCAP, PRECISION)
    if MASKED:
        b_s = tl.where(_visible(o_q, first_k + o_k, length, window, CAUSAL, HAS_WINDOW), b_s, float("-inf"))
    factor = _exponent_scale(scale, softcap, HAS_SOFTCAP)
    # [BLOCK_Q]
    b_new_max = tl.maximum(b_max, tl.max(b_s, 1) * factor)
    b_p = tl.exp2(tl.fma(b_s, factor, -b_new_max[:, None]))
    b_shrink = tl.exp2(b_max - b_new_max)
    b_sum = b_sum * b_shrink + tl.sum(b_p, 1)
    if HAS_DROPOUT:
        seed, threshold, _gain, sequence, head = random
        b_p = tl.where(_kept(seed, threshold, sequence, head, o_q, first_k, BLOCK_Q, BLOCK_K), b_p, 0.0)
    # [BLOCK_K, BLOCK_D]
    b_v = _load_rows(p_v + row * stride_v, stride_v, o_k, o_d, m_k, MASKED, HEAD_DIM, BLOCK_D)
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_shrink[:, None], input_precision=PRECISION)
    return b_acc, b_sum, b_new_max


@triton.jit(do_not_specialize=["window", "rows", "threshold"])
def _forward_kernel(p_q, p_k, p_v, p_out, p_lse, p_tiles, p_seed,
                    stride_q, stride_qh, stride_k, stride_kh, stride_v, stride_vh, stride_o, stride_oh,
                    rows, window, scale, softcap, threshold, gain,
                    GROUP: tl.constexpr, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
                    HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr,
                    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """One program: a tile of queries of one sequence and one head. Writes out (T, Hq, D) and lse (Hq, T), to base 2."""
    p_tile = p_tiles + tl.program_id(0) * TILE_FIELDS
    sequence = tl.load(p_tile)
    first_q = tl.load(p_tile + 1)
    start = tl.load(p_tile + 2).to(tl.int64)
    length = tl.load(p_tile + 3)
    head = tl.program_id(1).to(tl.int64)
    p_k += start * stride_k + head // GROUP * stride_kh
    p_v += start * stride_v + head // GROUP * stride_vh

    o_q = tl.arange(0, BLOCK_Q)
    o_d = tl.arange(0, BLOCK_D)
    m_q = first_q + o_q < length
    p_q += (start + first_q) * stride_q + head * stride_qh
    # [BLOCK_Q, BLOCK_D]
    b_q = _load_rows(p_q, stride_q, o_q, o_d, m_q, True, HEAD_DIM, BLOCK_D)
    b_acc = tl.zeros((BLOCK_Q, BLOCK_D), dtype=tl.float32)
    b_sum = tl.zeros((BLOCK_Q,), dtype=tl.float32)
    b_max = tl.full((BLOCK_Q,), LOWEST, dtype=tl.float32)

    random = (0, 0, 0, 0, 0)
    if HAS_DROPOUT:
        random = (tl.load(p_seed), threshold, gain, sequence, head)
    low, full_low, full_high, high = _key_range(first_q, length, window, BLOCK_Q, BLOCK_K, CAUSAL, HAS_WINDOW)
    for first_k in range(full_low, full_high, BLOCK_K):
        b_acc, b_sum, b_max = _attend(
            b_acc, b_sum, b_max, b_q, p_k, p_v, stride_k, stride_v, first_k, first_q + o_q, o_d,
            length, window, scale, softcap, random, False, CAUSAL, HAS_WINDOW, HAS_SOFTCAP, HAS_DROPOUT, PRECISION,
            HEAD_DIM, BLOCK_Q, BLOCK_K, BLOCK_D)  # fmt: skip
    # The masked tiles before and after the full ones in one loop: a second copy of the code would cost registers.
    skipped = full_high - full_low
    for step in range(low, high - skipped, BLOCK_K):
        first_k = step + skipped
        if HAS_WINDOW:
            first_k = tl.where(step < full_low, step, first_k)
        b_acc, b_sum, b_max = _attend(
            b_acc, b_sum, b_max, b_q, p_k, p_v, stride_k, stride_v, first_k, first_q + o_q, o_d,
            length, window, scale, softcap, random, True, CAUSAL, HAS_WINDOW, HAS_SOFTCAP, HAS_DROPOUT, PRECISION,
            HEAD_DIM, BLOCK_Q, BLOCK_K, BLOCK_D)  # fmt: skip

    b_sum = tl.where(m_q, b_sum, 1.0)  # queries past the end may have seen no key
    b_out = b_acc / b_sum[:, None]
    if HAS_DROPOUT:
        b_out *= gain
    p_out += (start + first_q) * stride_o + head * stride_oh
    m_out = m_q[:, None] & (o_d < HEAD_DIM)[None, :]
    tl.store(p_out + o_q[:, None] * stride_o + o_d[None, :], b_out.to(p_out.dtype.element_ty), mask=m_out)
    tl.store(p_lse + head * rows + start + first_q + o_q, b_max + tl.log2(b_sum), mask=m_q)


@dataclass(frozen=True)
class Rule:
    """Which keys a query sees, how its logits are made, and what is dropped: the same forward and backward."""

    causal: bool
    window: int | None
    softcap: float | None
    scale: float
    threshold: int  # dropout probability in 65536ths; 0: none
    seed: Tensor | None  # one int64 on the device; None without dropout

    def arguments(self, q: Tensor, k: Tensor) -> dict[str, Any]:
        """What every kernel is told, by name."""
        return {
            "p_seed": self.seed,
            "window": self.window or 0,
            "scale": self.scale,
            "softcap": self.softcap or 1.0,
            "threshold": self.threshold,
            "gain": dropout.gain_of(self.threshold),
            "GROUP": q.shape[1] // k.shape[1],
            "CAUSAL": self.causal,
            "HAS_WINDOW": self.window is not None,
            "HAS_SOFTCAP": self.softcap is not None,
            "HAS_DROPOUT": self.threshold > 0,
            "PRECISION": _precision(q),
            "HEAD_DIM": q.shape[2],
            "BLOCK_D": configurations.block_d(q.shape[2]),
        }


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, lengths: Tensor, rule: Rule
) -> tuple[Tensor, Tensor]:
    """Output (T, Hq, D) and log-sum-exp to base 2 (Hq, T) float32; rows in no sequence hold 0 and −inf."""
    rows, heads, head_dim = q.shape
    config = configurations.forward(head_dim, q.dtype, configurations.architecture_of(q.device))
    table = tile_table(starts, lengths, config.block_q)
    padded = table.tokens < rows
    out = q.new_zeros(q.shape) if padded else q.new_empty(q.shape)
    lse = q.new_empty((heads, rows), dtype=torch.float32)
    if padded:
        lse.fill_(float("-inf"))
    if table.count > 0:
        q, k, v = (readable(x) for x in (q, k, v))
        _forward_kernel[(table.count, heads)](**forward_arguments(q, k, v, out, lse, table, config, rule))
    return out, lse


def forward_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    table: TileTable,
    config: configurations.Configuration,
    rule: Rule,
) -> dict[str, Any]:
    """What `_forward_kernel` is launched with, by name; the ahead-of-time report compiles the same."""
    return {
        "p_q": q, "p_k": k, "p_v": v, "p_out": out, "p_lse": lse, "p_tiles": table.rows, "rows": q.shape[0],
        **strides(q=q, k=k, v=v, o=out), **rule.arguments(q, k), **config.arguments(),
    }  # fmt: skip


def strides(**tensors: Tensor) -> dict[str, int]:
    """stride_x and stride_xh, the strides of a row and of a head, for every tensor (rows, heads, D) passed as x=…"""
    rows = {f"stride_{name}": x.stride(0) for name, x in tensors.items()}
    return rows | {f"stride_{name}h": x.stride(1) for name, x in tensors.items()}


def readable(x: Tensor) -> Tensor:
    """The tensor itself, whatever its row and head strides; a copy only where elements of a head do not touch."""
    return x if x.stride(2) == 1 else x.contiguous()


def _precision(q: Tensor) -> str:
    """float32 products follow PyTorch's own switch: exact unless the user allowed TF32."""
    return "tf32" if q.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"
