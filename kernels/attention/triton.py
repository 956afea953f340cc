"""Bidirectional flash attention for GPUs, over packed and padded batches alike.

After FlashAttention-2 (Dao, 2023, arXiv:2307.08691): one program holds a tile of queries of one sequence and head,
walks over the keys, and keeps a running maximum and sum. What differs: the tile table launches exactly the programs
that have work; the window is symmetric; tiles that every query of the program sees run in a loop without masks, only
the others (the tail, the edges of a window or of the causal triangle) are masked.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .. import launch
from ..tiles import TileTable, tile_table
from . import configurations
from .triton_launch import Rule, describable, readable, sources, strides
from .triton_parts import (
    TOGETHER,
    _add_product,
    _exponent_scale,
    _exponents,
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

# A running maximum that starts finite never meets −inf − −inf, so a row whose first tiles are all masked needs no care.
LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def _attend(state, b_q, keys, values, first_k, o_q, length, window, scale, softcap, random,
            MASKED: tl.constexpr, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
            HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr, DESCRIBED: tl.constexpr, HEAD_DIM: tl.constexpr,
            BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr):  # fmt: skip
    """Add the keys first_k … first_k + BLOCK_K to the running softmax, (accumulator, sum, maximum of exponents, or in
    float32 of scores)."""
    EXACT: tl.constexpr = b_q[0].dtype == tl.float32
    b_acc, b_sum, b_max = state
    # [BLOCK_K, D]
    if DESCRIBED == TOGETHER:
        b_k, b_v = _load_both(keys, values, first_k, BLOCK_K, BLOCK_D, BLOCK_E)
    else:
        b_k = _load_rows(keys, first_k, MASKED, DESCRIBED, HEAD_DIM, BLOCK_K, BLOCK_D, BLOCK_E)
    # [BLOCK_Q, BLOCK_K]
    b_s = _scores(b_q, b_k, scale, softcap, HAS_SOFTCAP, PRECISION, BLOCK_E)
    if MASKED:
        o_k = first_k + tl.arange(0, BLOCK_K)
        b_s = tl.where(_visible(o_q[:, None], o_k[None, :], length, window, CAUSAL, HAS_WINDOW), b_s, float("-inf"))
    factor = _exponent_scale(scale, softcap, HAS_SOFTCAP)
    # [BLOCK_Q]
    if EXACT:
        b_new_max = tl.maximum(b_max, tl.max(b_s, 1))
        b_shrink = tl.exp2((b_max - b_new_max) * factor)
    else:
        b_new_max = tl.maximum(b_max, tl.max(b_s, 1) * factor)
        b_shrink = tl.exp2(b_max - b_new_max)
    b_p = tl.exp2(_exponents(b_s, -b_new_max[:, None], factor, EXACT))
    b_sum = b_sum * b_shrink + tl.sum(b_p, 1)
    if HAS_DROPOUT:
        b_p = tl.where(_kept(random, o_q, first_k, BLOCK_Q, BLOCK_K), b_p, 0.0)
    if DESCRIBED != TOGETHER:
        # [BLOCK_K, D]
        b_v = _load_rows(values, first_k, MASKED, DESCRIBED, HEAD_DIM, BLOCK_K, BLOCK_D, BLOCK_E)
    b_acc = _add_product(_times(b_acc, b_shrink[:, None], BLOCK_E), b_p, b_v, PRECISION, BLOCK_E)
    return (b_acc, b_sum, b_new_max)


@triton.jit(do_not_specialize=["window", "rows", "threshold"])
def _forward_kernel(p_q, p_k, p_v, p_k_rest, p_v_rest, p_out, p_sums, p_tiles, p_seed,
                    stride_q, stride_qh, stride_k, stride_kh, stride_v, stride_vh, stride_o, stride_oh,
                    rows, window, scale, softcap, threshold, gain,
                    UNIT: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr,
                    HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
                    DESCRIBED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
                    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr):  # fmt: skip
    """One program: a tile of queries of one sequence and one head. Writes out (T, Hq, D) and sums (1 or 3, Hq, T)."""
    sequence, first_q, start, length, _padded_start = _load_tile(p_tiles)
    head = tl.program_id(1)
    keys = _rows_of(p_k, p_k_rest, stride_k, stride_kh, start, length, head // GROUP, UNIT, DESCRIBED)
    values = _rows_of(p_v, p_v_rest, stride_v, stride_vh, start, length, head // GROUP, UNIT, DESCRIBED)
    queries = _rows_of(p_q, None, stride_q, stride_qh, start, length, head, UNIT, False)
    # [BLOCK_Q, D]
    b_q = _load_rows(queries, first_q, True, False, HEAD_DIM, BLOCK_Q, BLOCK_D, BLOCK_E)
    o_q = first_q + tl.arange(0, BLOCK_Q)
    b_sum = tl.zeros((BLOCK_Q,), dtype=tl.float32)
    b_max = tl.full((BLOCK_Q,), LOWEST, dtype=tl.float32)
    state = (_zeros(BLOCK_Q, BLOCK_D, BLOCK_E), b_sum, b_max)
    random = (0, 0, 0, 0, 0)
    if HAS_DROPOUT:
        random = (tl.load(p_seed), threshold, gain, sequence, head)

    low, full_low, full_high, high = _key_range(first_q, length, window, BLOCK_Q, BLOCK_K, CAUSAL, HAS_WINDOW)
    skipped = full_high - full_low
    TAIL_FIRST: tl.constexpr = BLOCK_T > 0 and not CAUSAL and not HAS_WINDOW and not DESCRIBED
    if TAIL_FIRST:
        for first_k in range(full_high, high, BLOCK_T):
            state = _attend(state, b_q, keys, values, first_k, o_q, length, window, scale, softcap, random, True,
                            CAUSAL, HAS_WINDOW, HAS_SOFTCAP, HAS_DROPOUT, PRECISION, DESCRIBED, HEAD_DIM, BLOCK_Q,
                            BLOCK_T, BLOCK_D, BLOCK_E)  # fmt: skip
    for first_k in range(full_low, full_high, BLOCK_K):
        state = _attend(state, b_q, keys, values, first_k, o_q, length, window, scale, softcap, random, False, CAUSAL,
                        HAS_WINDOW, HAS_SOFTCAP, HAS_DROPOUT, PRECISION, DESCRIBED, HEAD_DIM, BLOCK_Q, BLOCK_K,
                        BLOCK_D, BLOCK_E)  # fmt: skip
    if not TAIL_FIRST:
        for step in range(low, high - skipped, BLOCK_K):
            first_k = _masked_tile(step, full_low, skipped, HAS_WINDOW)
            state = _attend(state, b_q, keys, values, first_k, o_q, length, window, scale, softcap, random, True,
                            CAUSAL, HAS_WINDOW, HAS_SOFTCAP, HAS_DROPOUT, PRECISION, DESCRIBED, HEAD_DIM, BLOCK_Q,
                            BLOCK_K, BLOCK_D, BLOCK_E)  # fmt: skip

    b_acc, b_sum, b_max = state
    m_q = o_q < length
    b_sum = tl.where(m_q, b_sum, 1.0)  # queries past the end may have seen no key
    b_scale = 1.0 / b_sum
    if HAS_DROPOUT:
        b_scale *= gain
    outs = _rows_of(p_out, None, stride_o, stride_oh, start, length, head, UNIT, False)
    _store_rows(outs, first_q, _times(b_acc, b_scale[:, None], BLOCK_E), HEAD_DIM, BLOCK_Q, BLOCK_D, BLOCK_E)
    p_sums += head.to(tl.int64) * rows + start
    if b_q[0].dtype == tl.float32:
        part = tl.num_programs(1).to(tl.int64) * rows
        tl.store(p_sums + part + o_q, b_max, mask=m_q)
        tl.store(p_sums + 2 * part + o_q, b_sum, mask=m_q)
        b_max *= _exponent_scale(scale, softcap, HAS_SOFTCAP)
    tl.store(p_sums + o_q, b_max + tl.log2(b_sum), mask=m_q)


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, lengths: Tensor, rule: Rule
) -> tuple[Tensor, Tensor]:
    """Output (T, Hq, D) and `configurations.sums_like`; rows in no sequence hold 0 and −inf."""
    rows, heads, head_dim = q.shape
    q, k, v = (readable(x) for x in (q, k, v))
    config = configurations.forward(head_dim, q.dtype, launch.architecture_of(q.device), describable(k, v), rule.demand)
    table = tile_table(starts, lengths, config.block_q)
    padded = table.tokens < rows
    out = q.new_zeros(q.shape) if padded else q.new_empty(q.shape)
    sums = configurations.sums_like(q)
    if padded:
        sums.fill_(float("-inf"))
    if table.count > 0:
        _forward_kernel[(table.count, heads)](**forward_arguments(q, k, v, out, sums, table, config, rule))
    return out, sums


def forward_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    sums: Tensor,
    table: TileTable,
    config: configurations.Configuration,
    rule: Rule,
) -> dict[str, Any]:
    """What `_forward_kernel` is launched with, by name; the ahead-of-time report compiles the same."""
    return {
        "p_q": q, **sources(config, config.block_k, k=k, v=v), "p_out": out, "p_sums": sums, "p_tiles": table.rows,
        "rows": q.shape[0], **strides(q=q, k=k, v=v, o=out), **rule.arguments(q, k),
        **config.arguments(q.shape[2]),
    }  # fmt: skip
