"""Gradients of bidirectional flash attention: deterministic, no atomics, two kernels after a small preparation.

One kernel gives dK and dV: a program holds a tile of keys of one key head and walks over the queries of every query
head of its group, so that nothing is shared. The other gives dQ: a program holds a tile of queries and walks over the
keys. Both recompute the weights from the log-sum-exp (in float32 from its two parts), which is +inf past the end of a
sequence: a query that does not exist has weight zero, without a mask. It is kept negated: Triton 3.6 subtracts it by
instructions, and registers, of their own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch
from ..tiles import PADDED_TO, TileTable, tile_table
from . import configurations
from .triton_launch import Rule, describable, readable, sources, strides
from .triton_parts import (
    PADDING,
    TOGETHER,
    _add_product,
    _exponent_scale,
    _exponents,
    _inner,
    _kept,
    _key_range,
    _load_both,
    _load_rows,
    _load_tile,
    _masked_tile,
    _rows_of,
    _scores,
    _store_rows,
    _times,
    _visible,
    _zeros,
)


@triton.jit(do_not_specialize=["rows", "padded_blocks"])
def _prepare_kernel(p_grad, p_out, p_sums, p_rows, p_tiles, rows, padded_blocks,
                    stride_g, stride_gh, stride_o, stride_oh,
                    UNIT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr,
                    BLOCK_D: tl.constexpr):  # fmt: skip
    """The numbers of every row, (Hq, 4, padded_rows) with each sequence padded, so that no kernel masks them:
    minus the log-sum-exp (in float32 minus the largest score), minus delta, and delta = Σ dO·O; in float32 also one
    over the sum of weights."""
    EXACT: tl.constexpr = p_grad.dtype.element_ty == tl.float32
    _sequence, first_q, start, length, padded_start = _load_tile(p_tiles)
    head = tl.program_id(1)
    grads = _rows_of(p_grad, None, stride_g, stride_gh, start, length, head, UNIT, False)
    outs = _rows_of(p_out, None, stride_o, stride_oh, start, length, head, UNIT, False)
    # [BLOCK_Q, BLOCK_D]
    (b_grad,) = _load_rows(grads, first_q, True, False, HEAD_DIM, BLOCK_Q, BLOCK_D, 0)
    (b_out,) = _load_rows(outs, first_q, True, False, HEAD_DIM, BLOCK_Q, BLOCK_D, 0)
    # [BLOCK_Q]
    b_delta = tl.sum(b_grad.to(tl.float32) * b_out.to(tl.float32), 1)
    o_q = first_q + tl.arange(0, BLOCK_Q)
    head = head.to(tl.int64)
    part = tl.num_programs(1).to(tl.int64) * rows
    p_sums += head * rows + start + (part if EXACT else 0)
    p_shift, p_delta, p_inverse, apart = _row_numbers(p_rows, head, padded_start, padded_blocks)
    tl.store(p_shift + o_q, -tl.load(p_sums + o_q, mask=o_q < length, other=float("inf")))
    tl.store(p_shift + apart + o_q, -b_delta)
    tl.store(p_delta + o_q, b_delta)
    if EXACT:
        tl.store(p_inverse + o_q, tl.div_rn(1.0, tl.load(p_sums + part + o_q, mask=o_q < length, other=1.0)))


@triton.jit
def _row_numbers(p_rows, head, padded_start, padded_blocks):
    """Where one head's numbers of a sequence's rows start, as `_prepare_kernel` wrote them: (shift, delta, inverse),
    and how far apart these are. Minus delta lies behind the shift, for both to come in one copy."""
    padded_rows = padded_blocks.to(tl.int64) * PADDING  # a factor that Triton sees, so that they are read aligned
    p_shift = p_rows + head * 4 * padded_rows + padded_start
    p_delta = p_shift + 2 * padded_rows
    return p_shift, p_delta, p_delta + padded_rows, padded_rows


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
def _add_queries(b_dk, b_dv, b_k, b_v, queries, grads, numbers, first_q, first_k, length, window, scale,
                 softcap, random,
                 MASKED: tl.constexpr, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
                 HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr, DESCRIBED: tl.constexpr, FOLDED: tl.constexpr,
                 HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
                 BLOCK_E: tl.constexpr):  # fmt: skip
    """Add what the queries first_q … give to dK and dV of one tile of keys. Scores are transposed: [BK, BQ]."""
    o_q = first_q + tl.arange(0, BLOCK_Q)
    # [BLOCK_Q, D]
    if DESCRIBED == TOGETHER:
        b_q, b_grad = _load_both(queries, grads, first_q, BLOCK_Q, BLOCK_D, BLOCK_E)
    else:
        b_q = _load_rows(queries, first_q, MASKED, DESCRIBED, HEAD_DIM, BLOCK_Q, BLOCK_D, BLOCK_E)
    p_shift, p_delta, p_inverse, apart = numbers
    EXACT: tl.constexpr = b_k[0].dtype == tl.float32
    # [BLOCK_Q]
    if FOLDED:  # one copy a step for both; alone, what only starts a product would not be copied ahead at all
        b_shift, b_less = tl.split(tl.trans(tl.load(p_shift + tl.arange(0, 2)[:, None] * apart + o_q[None, :])))
        b_first = tl.broadcast_to(b_less[None, :], BLOCK_K, BLOCK_Q)
    else:
        b_shift = tl.load(p_shift + o_q)
        b_first = None
    # [BLOCK_K, BLOCK_Q]: K·Qᵀ rather than a transposed Q·Kᵀ, so that Pᵀ needs no trip through shared memory.
    b_s = _scores(b_k, b_q, scale, softcap, HAS_SOFTCAP, PRECISION, BLOCK_E)
    b_p = tl.exp2(_exponents(b_s, b_shift[None, :], _exponent_scale(scale, softcap, HAS_SOFTCAP), EXACT))
    if EXACT:
        b_p *= tl.load(p_inverse + o_q)[None, :]
    if MASKED and (CAUSAL or HAS_WINDOW):
        o_k = first_k + tl.arange(0, BLOCK_K)
        b_p = tl.where(_visible(o_q[None, :], o_k[:, None], length, window, CAUSAL, HAS_WINDOW), b_p, 0.0)
    if DESCRIBED != TOGETHER:
        # [BLOCK_Q, D]
        b_grad = _load_rows(grads, first_q, MASKED, DESCRIBED, HEAD_DIM, BLOCK_Q, BLOCK_D, BLOCK_E)
    b_dp = _inner(b_v, b_grad, PRECISION, BLOCK_E, b_first)
    b_kept = b_p
    if HAS_DROPOUT:
        gain = random[2]
        m_kept = tl.trans(_kept(random, o_q, first_k, BLOCK_Q, BLOCK_K))
        b_kept = tl.where(m_kept, b_p * gain, 0.0)
        b_dp = tl.where(m_kept, b_dp * gain, 0.0)
    # [BLOCK_K, D]
    b_dv = _add_product(b_dv, b_kept, b_grad, PRECISION, BLOCK_E)
    if not FOLDED:
        b_delta = tl.load(p_delta + o_q)
        b_dp -= b_delta[None, :]
    b_ds = _capped_slope(b_s, b_p * b_dp, HAS_SOFTCAP)
    b_dk = _add_product(b_dk, b_ds, b_q, PRECISION, BLOCK_E)
    return b_dk, b_dv


@triton.jit(do_not_specialize=["window", "padded_blocks", "threshold"])
def _dk_dv_kernel(p_q, p_k, p_v, p_grad, p_q_rest, p_grad_rest, p_rows, p_dk, p_dv, p_tiles, p_seed,
                  stride_q, stride_qh, stride_k, stride_kh, stride_v, stride_vh, stride_g, stride_gh, stride_d,
                  stride_dh, padded_blocks, window, scale, softcap, threshold, gain,
                  UNIT: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr,
                  HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
                  DESCRIBED: tl.constexpr, FOLDED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr,
                  BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
                  BLOCK_E: tl.constexpr):  # fmt: skip
    """One program: a tile of keys of one sequence and one key head, over every query head of its group."""
    sequence, first_k, start, length, padded_start = _load_tile(p_tiles)
    kv_head = tl.program_id(1)
    keys = _rows_of(p_k, None, stride_k, stride_kh, start, length, kv_head, UNIT, False)
    values = _rows_of(p_v, None, stride_v, stride_vh, start, length, kv_head, UNIT, False)
    # [BLOCK_K, D]
    b_k = _load_rows(keys, first_k, True, False, HEAD_DIM, BLOCK_K, BLOCK_D, BLOCK_E)
    b_v = _load_rows(values, first_k, True, False, HEAD_DIM, BLOCK_K, BLOCK_D, BLOCK_E)
    b_dk = _zeros(BLOCK_K, BLOCK_D, BLOCK_E)
    b_dv = _zeros(BLOCK_K, BLOCK_D, BLOCK_E)

    low, full_low, full_high, high = _query_range(first_k, length, window, BLOCK_Q, BLOCK_K, CAUSAL, HAS_WINDOW)
    skipped = full_high - full_low
    PLAIN: tl.constexpr = not CAUSAL and not HAS_WINDOW
    ALL_FULL: tl.constexpr = DESCRIBED and PLAIN  # descriptors end with the sequence, so its last tile needs no mask
    TAIL_FIRST: tl.constexpr = BLOCK_T > 0 and PLAIN and not DESCRIBED
    for member in range(0, GROUP):
        head = kv_head * GROUP + member
        queries = _rows_of(p_q, p_q_rest, stride_q, stride_qh, start, length, head, UNIT, DESCRIBED)
        grads = _rows_of(p_grad, p_grad_rest, stride_g, stride_gh, start, length, head, UNIT, DESCRIBED)
        numbers = _row_numbers(p_rows, head, padded_start, padded_blocks)
        random = (0, 0, 0, 0, 0)
        if HAS_DROPOUT:
            random = (tl.load(p_seed), threshold, gain, sequence, head)
        if TAIL_FIRST:
            for first_q in range(full_high, high, BLOCK_T):
                b_dk, b_dv = _add_queries(
                    b_dk, b_dv, b_k, b_v, queries, grads, numbers, first_q, first_k, length, window,
                    scale, softcap, random, True, CAUSAL, HAS_WINDOW, HAS_SOFTCAP, HAS_DROPOUT, PRECISION, DESCRIBED,
                    FOLDED, HEAD_DIM, BLOCK_T, BLOCK_K, BLOCK_D, BLOCK_E)  # fmt: skip
        for first_q in range(full_low, length if ALL_FULL else full_high, BLOCK_Q):
            b_dk, b_dv = _add_queries(
                b_dk, b_dv, b_k, b_v, queries, grads, numbers, first_q, first_k, length, window,
                scale, softcap, random, False, CAUSAL, HAS_WINDOW, HAS_SOFTCAP, HAS_DROPOUT, PRECISION, DESCRIBED,
                FOLDED, HEAD_DIM, BLOCK_Q, BLOCK_K, BLOCK_D, BLOCK_E)  # fmt: skip
        if not ALL_FULL and not TAIL_FIRST:
            for step in range(low, high - skipped, BLOCK_Q):
                first_q = _masked_tile(step, full_low, skipped, CAUSAL or HAS_WINDOW)
                b_dk, b_dv = _add_queries(
                    b_dk, b_dv, b_k, b_v, queries, grads, numbers, first_q, first_k, length, window,
                    scale, softcap, random, True, CAUSAL, HAS_WINDOW, HAS_SOFTCAP, HAS_DROPOUT, PRECISION, DESCRIBED,
                    FOLDED, HEAD_DIM, BLOCK_Q, BLOCK_K, BLOCK_D, BLOCK_E)  # fmt: skip

    dks = _rows_of(p_dk, None, stride_d, stride_dh, start, length, kv_head, UNIT, False)
    dvs = _rows_of(p_dv, None, stride_d, stride_dh, start, length, kv_head, UNIT, False)
    _store_rows(dks, first_k, _times(b_dk, scale, BLOCK_E), HEAD_DIM, BLOCK_K, BLOCK_D, BLOCK_E)
    _store_rows(dvs, first_k, b_dv, HEAD_DIM, BLOCK_K, BLOCK_D, BLOCK_E)


@triton.jit
def _add_keys(b_dq, b_q, b_grad, numbers, keys, values, first_k, o_q, length, window, scale, softcap, random,
              MASKED: tl.constexpr, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
              HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr, DESCRIBED: tl.constexpr, FOLDED: tl.constexpr,
              HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
              BLOCK_E: tl.constexpr):  # fmt: skip
    """Add what the keys first_k … give to dQ of one tile of queries."""
    # [BLOCK_K, D]
    if DESCRIBED == TOGETHER:
        b_k, b_v = _load_both(keys, values, first_k, BLOCK_K, BLOCK_D, BLOCK_E)
    else:
        b_k = _load_rows(keys, first_k, MASKED, DESCRIBED, HEAD_DIM, BLOCK_K, BLOCK_D, BLOCK_E)
        b_v = _load_rows(values, first_k, MASKED, DESCRIBED, HEAD_DIM, BLOCK_K, BLOCK_D, BLOCK_E)
    # [BLOCK_Q, BLOCK_K]
    b_s = _scores(b_q, b_k, scale, softcap, HAS_SOFTCAP, PRECISION, BLOCK_E)
    b_shift, b_delta, b_inverse = numbers
    EXACT: tl.constexpr = b_q[0].dtype == tl.float32
    b_p = tl.exp2(_exponents(b_s, b_shift[:, None], _exponent_scale(scale, softcap, HAS_SOFTCAP), EXACT))
    if EXACT:
        b_p *= b_inverse[:, None]
    if MASKED:
        # Keys past the end are zeros: unmasked, their weight 2^−lse would overflow where every logit is very negative.
        o_k = first_k + tl.arange(0, BLOCK_K)
        b_p = tl.where(_visible(o_q[:, None], o_k[None, :], length, window, CAUSAL, HAS_WINDOW), b_p, 0.0)
    b_first = tl.broadcast_to(-b_delta[:, None], BLOCK_Q, BLOCK_K) if FOLDED else None
    b_dp = _inner(b_grad, b_v, PRECISION, BLOCK_E, b_first)
    if HAS_DROPOUT:
        gain = random[2]
        b_dp = tl.where(_kept(random, o_q, first_k, BLOCK_Q, BLOCK_K), b_dp * gain, 0.0)
    if not FOLDED:
        b_dp -= b_delta[:, None]
    b_ds = _capped_slope(b_s, b_p * b_dp, HAS_SOFTCAP)
    return _add_product(b_dq, b_ds, b_k, PRECISION, BLOCK_E)


@triton.jit(do_not_specialize=["window", "padded_blocks", "threshold"])
def _dq_kernel(p_q, p_k, p_v, p_grad, p_k_rest, p_v_rest, p_rows, p_dq, p_tiles, p_seed,
               stride_q, stride_qh, stride_k, stride_kh, stride_v, stride_vh, stride_g, stride_gh, stride_d,
               stride_dh, padded_blocks, window, scale, softcap, threshold, gain,
               UNIT: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr,
               HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
               DESCRIBED: tl.constexpr, FOLDED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr,
               BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr):  # fmt: skip
    """One program: a tile of queries of one sequence and one head."""
    sequence, first_q, start, length, padded_start = _load_tile(p_tiles)
    head = tl.program_id(1)
    keys = _rows_of(p_k, p_k_rest, stride_k, stride_kh, start, length, head // GROUP, UNIT, DESCRIBED)
    values = _rows_of(p_v, p_v_rest, stride_v, stride_vh, start, length, head // GROUP, UNIT, DESCRIBED)
    queries = _rows_of(p_q, None, stride_q, stride_qh, start, length, head, UNIT, False)
    grads = _rows_of(p_grad, None, stride_g, stride_gh, start, length, head, UNIT, False)
    # [BLOCK_Q, D]
    b_q = _load_rows(queries, first_q, True, False, HEAD_DIM, BLOCK_Q, BLOCK_D, BLOCK_E)
    b_grad = _load_rows(grads, first_q, True, False, HEAD_DIM, BLOCK_Q, BLOCK_D, BLOCK_E)
    o_q = first_q + tl.arange(0, BLOCK_Q)
    # [BLOCK_Q]
    EXACT: tl.constexpr = b_q[0].dtype == tl.float32
    p_shift, p_delta, p_inverse, _apart = _row_numbers(p_rows, head, padded_start, padded_blocks)
    b_shift = tl.load(p_shift + o_q)
    numbers = (b_shift, tl.load(p_delta + o_q), tl.load(p_inverse + o_q) if EXACT else b_shift)
    b_dq = _zeros(BLOCK_Q, BLOCK_D, BLOCK_E)
    random = (0, 0, 0, 0, 0)
    if HAS_DROPOUT:
        random = (tl.load(p_seed), threshold, gain, sequence, head)

    low, full_low, full_high, high = _key_range(first_q, length, window, BLOCK_Q, BLOCK_K, CAUSAL, HAS_WINDOW)
    skipped = full_high - full_low
    TAIL_FIRST: tl.constexpr = BLOCK_T > 0 and not CAUSAL and not HAS_WINDOW and not DESCRIBED
    if TAIL_FIRST:
        for first_k in range(full_high, high, BLOCK_T):
            b_dq = _add_keys(b_dq, b_q, b_grad, numbers, keys, values, first_k, o_q, length, window, scale,
                             softcap, random, True, CAUSAL, HAS_WINDOW, HAS_SOFTCAP, HAS_DROPOUT, PRECISION, DESCRIBED,
                             FOLDED, HEAD_DIM, BLOCK_Q, BLOCK_T, BLOCK_D, BLOCK_E)  # fmt: skip
    for first_k in range(full_low, full_high, BLOCK_K):
        b_dq = _add_keys(b_dq, b_q, b_grad, numbers, keys, values, first_k, o_q, length, window, scale, softcap,
                         random, False, CAUSAL, HAS_WINDOW, HAS_SOFTCAP, HAS_DROPOUT, PRECISION, DESCRIBED, FOLDED,
                         HEAD_DIM, BLOCK_Q, BLOCK_K, BLOCK_D, BLOCK_E)  # fmt: skip
    if not TAIL_FIRST:
        for step in range(low, high - skipped, BLOCK_K):
            first_k = _masked_tile(step, full_low, skipped, HAS_WINDOW)
            b_dq = _add_keys(b_dq, b_q, b_grad, numbers, keys, values, first_k, o_q, length, window, scale,
                             softcap, random, True, CAUSAL, HAS_WINDOW, HAS_SOFTCAP, HAS_DROPOUT, PRECISION, DESCRIBED,
                             FOLDED, HEAD_DIM, BLOCK_Q, BLOCK_K, BLOCK_D, BLOCK_E)  # fmt: skip

    dqs = _rows_of(p_dq, None, stride_d, stride_dh, start, length, head, UNIT, False)
    _store_rows(dqs, first_q, _times(b_dq, scale, BLOCK_E), HEAD_DIM, BLOCK_Q, BLOCK_D, BLOCK_E)


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    sums: Tensor,
    starts: Tensor,
    lengths: Tensor,
    rule: Rule,
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK and dV from the gradient of the output, the output and `configurations.sums_like`."""
    grad, q, k, v = (readable(x) for x in (grad, q, k, v))
    architecture = launch.architecture_of(q.device)
    table = tile_table(starts, lengths, PADDED_TO)
    new = torch.zeros if table.tokens < q.shape[0] else torch.empty
    dq, dk, dv = (new(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if table.count == 0:
        return dq, dk, dv
    numbers = _prepare(grad, out, sums, table)
    config = configurations.backward_keys(q.shape[2], q.dtype, architecture, describable(q, grad), rule.demand)
    _check_padding(config.block_q, config.tail)
    keys = tile_table(starts, lengths, config.block_k)
    _dk_dv_kernel[(keys.count, k.shape[1])](**dk_dv_arguments(q, k, v, grad, numbers, dk, dv, keys, config, rule))
    config = configurations.backward_queries(q.shape[2], q.dtype, architecture, describable(k, v), rule.demand)
    _check_padding(config.block_q)
    queries = tile_table(starts, lengths, config.block_q)
    _dq_kernel[(queries.count, q.shape[1])](**dq_arguments(q, k, v, grad, numbers, dq, queries, config, rule))
    return dq, dk, dv


def _check_padding(*blocks: int) -> None:
    """Steps of so many rows stay within a sequence's part of the padded numbers, which kernels read without a mask."""
    assert all(PADDED_TO % block == 0 for block in blocks if block), f"steps of {blocks} rows do not divide {PADDED_TO}"


def _prepare(grad: Tensor, out: Tensor, sums: Tensor, table: TileTable) -> Tensor:
    """The numbers of every row, (Hq, 4, padded rows) float32."""
    _parts, heads, rows = sums.shape
    numbers = sums.new_empty((heads, 4, table.padded_rows))
    _prepare_kernel[(table.count, heads)](
        p_grad=grad, p_out=out, p_sums=sums, p_rows=numbers, p_tiles=table.rows, rows=rows,
        padded_blocks=table.padded_rows // PADDED_TO, **strides(g=grad, o=out), HEAD_DIM=out.shape[2],
        BLOCK_Q=PADDED_TO, BLOCK_D=configurations.block_d(out.shape[2]), num_warps=8,
    )  # fmt: skip
    return numbers


def dk_dv_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    numbers: Tensor,
    dk: Tensor,
    dv: Tensor,
    table: TileTable,
    config: configurations.Configuration,
    rule: Rule,
) -> dict[str, object]:
    """What `_dk_dv_kernel` is launched with, by name."""
    return {
        **sources(config, config.block_q, q=q, grad=grad), "p_k": k, "p_v": v, "p_rows": numbers,
        "p_dk": dk, "p_dv": dv, "p_tiles": table.rows, "padded_blocks": numbers.shape[2] // PADDED_TO,
        **strides(q=q, k=k, v=v, g=grad, d=dk), **rule.arguments(q, k), **config.arguments(q.shape[2]),
        "FOLDED": config.folded,
    }  # fmt: skip


def dq_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    numbers: Tensor,
    dq: Tensor,
    table: TileTable,
    config: configurations.Configuration,
    rule: Rule,
) -> dict[str, object]:
    """What `_dq_kernel` is launched with, by name."""
    return {
        "p_q": q, "p_grad": grad, **sources(config, config.block_k, k=k, v=v), "p_rows": numbers, "p_dq": dq,
        "p_tiles": table.rows, "padded_blocks": numbers.shape[2] // PADDED_TO,
        **strides(q=q, k=k, v=v, g=grad, d=dq), **rule.arguments(q, k), **config.arguments(q.shape[2]),
        "FOLDED": config.folded,
    }  # fmt: skip
