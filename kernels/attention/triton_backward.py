"""Gradients of bidirectional flash attention: deterministic, no atomics, two kernels after a small preparation.

One kernel gives dK and dV: a program holds a tile of keys of one key head and walks over the queries of every query
head of its group, so that nothing is shared. The other gives dQ: a program holds a tile of queries and walks over the
keys. Both recompute the weights from the log-sum-exp, which is +inf past the end of a sequence: a query that does
not exist has weight zero, without a mask.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tiles import PADDED_TO, TileTable, tile_table
from . import configurations
from .triton import (
    TILE_FIELDS,
    Rule,
    _exponent_scale,
    _kept,
    _key_range,
    _load_rows,
    _scores,
    _visible,
    readable,
    strides,
)


@triton.jit(do_not_specialize=["rows", "padded_rows"])
def _prepare_kernel(p_grad, p_out, p_lse, p_delta, p_padded_lse, p_tiles, rows, padded_rows,
                    stride_g, stride_gh, stride_o, stride_oh,
                    HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """delta = Σ dO·O a row and the log-sum-exp, both (Hq, padded_rows) with each sequence padded: no masks later."""
    p_tile = p_tiles + tl.program_id(0) * TILE_FIELDS
    first_q = tl.load(p_tile + 1)
    start = tl.load(p_tile + 2).to(tl.int64)
    length = tl.load(p_tile + 3)
    padded_start = tl.load(p_tile + 4).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    o_q = tl.arange(0, BLOCK_Q)
    o_d = tl.arange(0, BLOCK_D)
    m_q = first_q + o_q < length
    row = start + first_q
    # [BLOCK_Q, BLOCK_D]
    b_grad = _load_rows(p_grad + row * stride_g + head * stride_gh, stride_g, o_q, o_d, m_q, True, HEAD_DIM, BLOCK_D)
    b_out = _load_rows(p_out + row * stride_o + head * stride_oh, stride_o, o_q, o_d, m_q, True, HEAD_DIM, BLOCK_D)
    # [BLOCK_Q]
    b_delta = tl.sum(b_grad.to(tl.float32) * b_out.to(tl.float32), 1)
    b_lse = tl.load(p_lse + head * rows + row + o_q, mask=m_q, other=float("inf"))
    target = head * padded_rows + padded_start + first_q
    tl.store(p_delta + target + o_q, b_delta)
    tl.store(p_padded_lse + target + o_q, b_lse)


@triton.jit
def _query_range(first_k, length, window, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr,
                 HAS_WINDOW: tl.constexpr):  # fmt: skip
    """Queries that see a tile of keys: [low, high), of which [full_low, full_high) need no mask. Multiples of BLOCK_Q
    but for high."""
    last_k = tl.minimum(first_k + BLOCK_K, length) - 1
    low = 0
    high = length
    full_low = 0
    full_high = length
    if CAUSAL:
        low = first_k // BLOCK_Q * BLOCK_Q
        full_low = tl.cdiv(last_k, BLOCK_Q) * BLOCK_Q
    if HAS_WINDOW:
        if not CAUSAL:
            low = tl.maximum(first_k - window, 0) // BLOCK_Q * BLOCK_Q
            full_low = tl.cdiv(tl.maximum(last_k - window, 0), BLOCK_Q) * BLOCK_Q
        high = tl.minimum(high, last_k + window + 1)
        full_high = tl.minimum(full_high, first_k + window + 1)
    full_low = tl.minimum(full_low, tl.cdiv(high, BLOCK_Q) * BLOCK_Q)
    full_high = tl.maximum(full_high // BLOCK_Q * BLOCK_Q, full_low)
    return low, full_low, full_high, high


@triton.jit
def _capped_slope(b_s, b_grad, HAS_SOFTCAP: tl.constexpr):
    """The gradient through softcap: b_s holds the tanh, whose slope is 1 − tanh²."""
    if HAS_SOFTCAP:
        b_grad = b_grad * (1.0 - b_s * b_s)
    return b_grad


@triton.jit
def _add_queries(b_dk, b_dv, b_k, b_v, p_q, p_grad, p_lse, p_delta, stride_q, stride_g, first_q, first_k, o_d,
                 length, window, scale, softcap, random,
                 MASKED: tl.constexpr, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
                 HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr,
                 BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Add what the queries first_q … give to dK and dV of one tile of keys. Scores are transposed: [BK, BQ]."""
    o_q = tl.arange(0, BLOCK_Q)
    o_k = tl.arange(0, BLOCK_K)
    m_q = first_q + o_q < length
    row = tl.to_tensor(first_q).to(tl.int64)
    # [BLOCK_Q, BLOCK_D]
    b_q = _load_rows(p_q + row * stride_q, stride_q, o_q, o_d, m_q, MASKED, HEAD_DIM, BLOCK_D)
    # [BLOCK_Q]
    b_lse = tl.load(p_lse + first_q + o_q)
    # [BLOCK_K, BLOCK_Q]: K·Qᵀ rather than a transposed Q·Kᵀ, so that Pᵀ needs no trip through shared memory.
    b_s = _scores(b_k, b_q, scale, softcap, HAS_SOFTCAP, PRECISION)
    b_p = tl.exp2(tl.fma(b_s, _exponent_scale(scale, softcap, HAS_SOFTCAP), -b_lse[None, :]))
    if MASKED and (CAUSAL or HAS_WINDOW):
        m_s = _visible(first_q + o_q, first_k + o_k, length, window, CAUSAL, HAS_WINDOW)
        b_p = tl.where(tl.trans(m_s), b_p, 0.0)
    # [BLOCK_Q, BLOCK_D]
    b_grad = _load_rows(p_grad + row * stride_g, stride_g, o_q, o_d, m_q, MASKED, HEAD_DIM, BLOCK_D)
    b_dp = tl.dot(b_v, tl.trans(b_grad), input_precision=PRECISION)
    b_kept = b_p
    if HAS_DROPOUT:
        seed, threshold, gain, sequence, head = random
        m_kept = tl.trans(_kept(seed, threshold, sequence, head, first_q + o_q, first_k, BLOCK_Q, BLOCK_K))
        b_kept = tl.where(m_kept, b_p * gain, 0.0)
        b_dp = tl.where(m_kept, b_dp * gain, 0.0)
    # [BLOCK_K, BLOCK_D]
    b_dv = tl.dot(b_kept.to(b_grad.dtype), b_grad, b_dv, input_precision=PRECISION)
    b_delta = tl.load(p_delta + first_q + o_q)
    b_ds = _capped_slope(b_s, b_p * (b_dp - b_delta[None, :]), HAS_SOFTCAP)
    b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    return b_dk, b_dv


@triton.jit(do_not_specialize=["window", "padded_rows", "threshold"])
def _dk_dv_kernel(p_q, p_k, p_v, p_grad, p_lse, p_delta, p_dk, p_dv, p_tiles, p_seed,
                  stride_q, stride_qh, stride_k, stride_kh, stride_v, stride_vh, stride_g, stride_gh, stride_d,
                  stride_dh, padded_rows, window, scale, softcap, threshold, gain,
                  GROUP: tl.constexpr, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
                  HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr,
                  BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """One program: a tile of keys of one sequence and one key head, over every query head of its group."""
    p_tile = p_tiles + tl.program_id(0) * TILE_FIELDS
    sequence = tl.load(p_tile)
    first_k = tl.load(p_tile + 1)
    start = tl.load(p_tile + 2).to(tl.int64)
    length = tl.load(p_tile + 3)
    padded_start = tl.load(p_tile + 4).to(tl.int64)
    kv_head = tl.program_id(1).to(tl.int64)
    o_k = tl.arange(0, BLOCK_K)
    o_d = tl.arange(0, BLOCK_D)
    m_k = first_k + o_k < length
    row = start + first_k
    # [BLOCK_K, BLOCK_D]
    b_k = _load_rows(p_k + row * stride_k + kv_head * stride_kh, stride_k, o_k, o_d, m_k, True, HEAD_DIM, BLOCK_D)
    b_v = _load_rows(p_v + row * stride_v + kv_head * stride_vh, stride_v, o_k, o_d, m_k, True, HEAD_DIM, BLOCK_D)
    b_dk = tl.zeros((BLOCK_K, BLOCK_D), dtype=tl.float32)
    b_dv = tl.zeros((BLOCK_K, BLOCK_D), dtype=tl.float32)

    low, full_low, full_high, high = _query_range(first_k, length, window, BLOCK_Q, BLOCK_K, CAUSAL, HAS_WINDOW)
    skipped = full_high - full_low
    for member in range(0, GROUP):
        head = kv_head * GROUP + member
        p_head_q = p_q + start * stride_q + head * stride_qh
        p_head_grad = p_grad + start * stride_g + head * stride_gh
        p_head_lse = p_lse + head * padded_rows + padded_start
        p_head_delta = p_delta + head * padded_rows + padded_start
        random = (0, 0, 0, 0, 0)
        if HAS_DROPOUT:
            random = (tl.load(p_seed), threshold, gain, sequence, head)
        for first_q in range(full_low, full_high, BLOCK_Q):
            b_dk, b_dv = _add_queries(
                b_dk, b_dv, b_k, b_v, p_head_q, p_head_grad, p_head_lse, p_head_delta, stride_q, stride_g, first_q,
                first_k, o_d, length, window, scale, softcap, random, False, CAUSAL, HAS_WINDOW, HAS_SOFTCAP,
                HAS_DROPOUT, PRECISION, HEAD_DIM, BLOCK_Q, BLOCK_K, BLOCK_D)  # fmt: skip
        for step in range(low, high - skipped, BLOCK_Q):
            first_q = step + skipped
            if CAUSAL or HAS_WINDOW:
                first_q = tl.where(step < full_low, step, first_q)
            b_dk, b_dv = _add_queries(
                b_dk, b_dv, b_k, b_v, p_head_q, p_head_grad, p_head_lse, p_head_delta, stride_q, stride_g, first_q,
                first_k, o_d, length, window, scale, softcap, random, True, CAUSAL, HAS_WINDOW, HAS_SOFTCAP,
                HAS_DROPOUT, PRECISION, HEAD_DIM, BLOCK_Q, BLOCK_K, BLOCK_D)  # fmt: skip

    m_d = m_k[:, None] & (o_d < HEAD_DIM)[None, :]
    o_tile = row * stride_d + kv_head * stride_dh + o_k[:, None] * stride_d + o_d[None, :]
    tl.store(p_dk + o_tile, (b_dk * scale).to(p_dk.dtype.element_ty), mask=m_d)
    tl.store(p_dv + o_tile, b_dv.to(p_dv.dtype.element_ty), mask=m_d)


@triton.jit
def _add_keys(b_dq, b_q, b_grad, b_lse, b_delta, p_k, p_v, stride_k, stride_v, first_k, o_q, o_d,
              length, window, scale, softcap, random,
              MASKED: tl.constexpr, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
              HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr,
              BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Add what the keys first_k … give to dQ of one tile of queries."""
    o_k = tl.arange(0, BLOCK_K)
    m_k = first_k + o_k < length
    row = tl.to_tensor(first_k).to(tl.int64)
    # [BLOCK_K, BLOCK_D]
    b_k = _load_rows(p_k + row * stride_k, stride_k, o_k, o_d, m_k, MASKED, HEAD_DIM, BLOCK_D)
    b_v = _load_rows(p_v + row * stride_v, stride_v, o_k, o_d, m_k, MASKED, HEAD_DIM, BLOCK_D)
    # [BLOCK_Q, BLOCK_K]
    b_s = _scores(b_q, b_k, scale, softcap, HAS_SOFTCAP, PRECISION)
    b_p = tl.exp2(tl.fma(b_s, _exponent_scale(scale, softcap, HAS_SOFTCAP), -b_lse[:, None]))
    if MASKED:
        # Keys past the end are zeros: unmasked, their weight 2^−lse would overflow where every logit is very negative.
        b_p = tl.where(_visible(o_q, first_k + o_k, length, window, CAUSAL, HAS_WINDOW), b_p, 0.0)
    b_dp = tl.dot(b_grad, tl.trans(b_v), input_precision=PRECISION)
    if HAS_DROPOUT:
        seed, threshold, gain, sequence, head = random
        m_kept = _kept(seed, threshold, sequence, head, o_q, first_k, BLOCK_Q, BLOCK_K)
        b_dp = tl.where(m_kept, b_dp * gain, 0.0)
    b_ds = _capped_slope(b_s, b_p * (b_dp - b_delta[:, None]), HAS_SOFTCAP)
    return tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=["window", "padded_rows", "threshold"])
def _dq_kernel(p_q, p_k, p_v, p_grad, p_lse, p_delta, p_dq, p_tiles, p_seed,
               stride_q, stride_qh, stride_k, stride_kh, stride_v, stride_vh, stride_g, stride_gh, stride_d,
               stride_dh, padded_rows, window, scale, softcap, threshold, gain,
               GROUP: tl.constexpr, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
               HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr,
               BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """One program: a tile of queries of one sequence and one head."""
    p_tile = p_tiles + tl.program_id(0) * TILE_FIELDS
    sequence = tl.load(p_tile)
    first_q = tl.load(p_tile + 1)
    start = tl.load(p_tile + 2).to(tl.int64)
    length = tl.load(p_tile + 3)
    padded_start = tl.load(p_tile + 4).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    p_k += start * stride_k + head // GROUP * stride_kh
    p_v += start * stride_v + head // GROUP * stride_vh
    o_q = tl.arange(0, BLOCK_Q)
    o_d = tl.arange(0, BLOCK_D)
    m_q = first_q + o_q < length
    row = start + first_q
    # [BLOCK_Q, BLOCK_D]
    b_q = _load_rows(p_q + row * stride_q + head * stride_qh, stride_q, o_q, o_d, m_q, True, HEAD_DIM, BLOCK_D)
    b_grad = _load_rows(p_grad + row * stride_g + head * stride_gh, stride_g, o_q, o_d, m_q, True, HEAD_DIM, BLOCK_D)
    # [BLOCK_Q]
    b_lse = tl.load(p_lse + head * padded_rows + padded_start + first_q + o_q)
    b_delta = tl.load(p_delta + head * padded_rows + padded_start + first_q + o_q)
    b_dq = tl.zeros((BLOCK_Q, BLOCK_D), dtype=tl.float32)
    random = (0, 0, 0, 0, 0)
    if HAS_DROPOUT:
        random = (tl.load(p_seed), threshold, gain, sequence, head)

    low, full_low, full_high, high = _key_range(first_q, length, window, BLOCK_Q, BLOCK_K, CAUSAL, HAS_WINDOW)
    skipped = full_high - full_low
    for first_k in range(full_low, full_high, BLOCK_K):
        b_dq = _add_keys(b_dq, b_q, b_grad, b_lse, b_delta, p_k, p_v, stride_k, stride_v, first_k, first_q + o_q, o_d,
                         length, window, scale, softcap, random, False, CAUSAL, HAS_WINDOW, HAS_SOFTCAP, HAS_DROPOUT,
                         PRECISION, HEAD_DIM, BLOCK_Q, BLOCK_K, BLOCK_D)  # fmt: skip
    for step in range(low, high - skipped, BLOCK_K):
        first_k = step + skipped
        if HAS_WINDOW:
            first_k = tl.where(step < full_low, step, first_k)
        b_dq = _add_keys(b_dq, b_q, b_grad, b_lse, b_delta, p_k, p_v, stride_k, stride_v, first_k, first_q + o_q, o_d,
                         length, window, scale, softcap, random, True, CAUSAL, HAS_WINDOW, HAS_SOFTCAP, HAS_DROPOUT,
                         PRECISION, HEAD_DIM, BLOCK_Q, BLOCK_K, BLOCK_D)  # fmt: skip

    m_d = m_q[:, None] & (o_d < HEAD_DIM)[None, :]
    o_tile = row * stride_d + head * stride_dh + o_q[:, None] * stride_d + o_d[None, :]
    tl.store(p_dq + o_tile, (b_dq * scale).to(p_dq.dtype.element_ty), mask=m_d)


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    starts: Tensor,
    lengths: Tensor,
    rule: Rule,
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK and dV from the gradient of the output, the output and the log-sum-exp to base 2 (Hq, T)."""
    grad, q, k, v = (readable(x) for x in (grad, q, k, v))
    architecture = configurations.architecture_of(q.device)
    table = tile_table(starts, lengths, PADDED_TO)
    new = torch.zeros if table.tokens < q.shape[0] else torch.empty
    dq, dk, dv = (new(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if table.count == 0:
        return dq, dk, dv
    padded_lse, delta = _prepare(grad, out, lse, table)
    config = configurations.backward_keys(q.shape[2], q.dtype, architecture)
    keys = tile_table(starts, lengths, config.block_k)
    _dk_dv_kernel[(keys.count, k.shape[1])](
        **dk_dv_arguments(q, k, v, grad, padded_lse, delta, dk, dv, keys, config, rule)
    )
    config = configurations.backward_queries(q.shape[2], q.dtype, architecture)
    queries = tile_table(starts, lengths, config.block_q)
    _dq_kernel[(queries.count, q.shape[1])](**dq_arguments(q, k, v, grad, padded_lse, delta, dq, queries, config, rule))
    return dq, dk, dv


def _prepare(grad: Tensor, out: Tensor, lse: Tensor, table: TileTable) -> tuple[Tensor, Tensor]:
    """The log-sum-exp and delta, each (Hq, padded rows) float32."""
    padded_lse, delta = (lse.new_empty((lse.shape[0], table.padded_rows)) for _ in range(2))
    _prepare_kernel[(table.count, lse.shape[0])](
        p_grad=grad, p_out=out, p_lse=lse, p_delta=delta, p_padded_lse=padded_lse, p_tiles=table.rows,
        rows=lse.shape[1], padded_rows=table.padded_rows, **strides(g=grad, o=out), HEAD_DIM=out.shape[2],
        BLOCK_Q=PADDED_TO, BLOCK_D=configurations.block_d(out.shape[2]), num_warps=8,
    )  # fmt: skip
    return padded_lse, delta


def dk_dv_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    lse: Tensor,
    delta: Tensor,
    dk: Tensor,
    dv: Tensor,
    table: TileTable,
    config: configurations.Configuration,
    rule: Rule,
) -> dict[str, object]:
    """What `_dk_dv_kernel` is launched with, by name."""
    return {
        "p_q": q, "p_k": k, "p_v": v, "p_grad": grad, "p_lse": lse, "p_delta": delta, "p_dk": dk, "p_dv": dv,
        "p_tiles": table.rows, "padded_rows": lse.shape[1], **strides(q=q, k=k, v=v, g=grad, d=dk),
        **rule.arguments(q, k), **config.arguments(),
    }  # fmt: skip


def dq_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    lse: Tensor,
    delta: Tensor,
    dq: Tensor,
    table: TileTable,
    config: configurations.Configuration,
    rule: Rule,
) -> dict[str, object]:
    """What `_dq_kernel` is launched with, by name."""
    return {
        "p_q": q, "p_k": k, "p_v": v, "p_grad": grad, "p_lse": lse, "p_delta": delta, "p_dq": dq,
        "p_tiles": table.rows, "padded_rows": lse.shape[1], **strides(q=q, k=k, v=v, g=grad, d=dq),
        **rule.arguments(q, k), **config.arguments(),
    }  # fmt: skip
