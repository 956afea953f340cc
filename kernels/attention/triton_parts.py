"""What the attention kernels share: loading rows, products of split tiles, scores, masks, and what dropout keeps.

A tile of rows is a tuple of one or two blocks: heads whose size is no power of two may be split (80 as 64 + 16) rather
than padded to the next one (128).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.tools.ragged_tma import load_ragged, to_ragged_indices

from ..tiles import FIELDS, PADDED_TO
from ..triton_math import LOG2_E, tanh
from . import dropout

DROPOUT_ROUNDS = tl.constexpr(dropout.ROUNDS)
TILE_FIELDS = tl.constexpr(FIELDS)
PADDING = tl.constexpr(PADDED_TO)
TOGETHER = tl.constexpr(2)  # DESCRIBED is 0: pointers, 1: descriptors, TOGETHER: and both tiles of a step at once


@triton.jit
def _load_tile(p_tiles):
    """This program's tile: sequence, first position, sequence's first row, length, first row in padded buffers."""
    p_tile = p_tiles + tl.program_id(0) * TILE_FIELDS
    padded_start = tl.multiple_of(tl.load(p_tile + 4), PADDING)
    return tl.load(p_tile), tl.load(p_tile + 1), tl.load(p_tile + 2), tl.load(p_tile + 3), padded_start


@triton.jit
def _rows_of(x, x_rest, stride, stride_h, start, length, head, UNIT: tl.constexpr, DESCRIBED: tl.constexpr):
    """The rows of one sequence and head, as `_load_rows` takes them. x is a pointer, or a ragged tensor descriptor (and
    x_rest the one of the second block of columns). Strides are counted in UNITs of elements."""
    stride = stride * UNIT
    if x_rest is None:
        x_rest = x  # Triton 3.6 cannot return None
    if not DESCRIBED:
        x += start.to(tl.int64) * stride + head.to(tl.int64) * (stride_h * UNIT)  # T·H·D can pass 2³¹
    return (x, x_rest, stride, start, length, head)


@triton.jit
def _load_rows(rows, first, MASKED: tl.constexpr, DESCRIBED: tl.constexpr, HEAD_DIM: tl.constexpr,
               BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr):  # fmt: skip
    """Rows first … first + BLOCK of a sequence; past its end zeros, which by pointers takes MASKED.
    → ([BLOCK, BLOCK_D],) or ([BLOCK, BLOCK_D], [BLOCK, BLOCK_E])"""
    x, x_rest, stride, start, length, head = rows
    if DESCRIBED:
        b_x = load_ragged(x, start, length, [first, head, 0]).reshape(BLOCK, BLOCK_D)
        if BLOCK_E > 0:
            b_rest = load_ragged(x_rest, start, length, [first, head, BLOCK_D]).reshape(BLOCK, BLOCK_E)
    else:
        o_row = tl.arange(0, BLOCK)
        m_row = first + o_row < length
        # The tile's base in int64, offsets within it in int32: fewer registers than pointers carried through the loop.
        p_row = x + (first + tl.full((), 0, tl.int64)) * stride + o_row[:, None] * stride
        b_x = _load_columns(p_row, m_row, 0, MASKED, HEAD_DIM, BLOCK_D)
        if BLOCK_E > 0:
            b_rest = _load_columns(p_row, m_row, BLOCK_D, MASKED, HEAD_DIM, BLOCK_E)
    if BLOCK_E > 0:
        return (b_x, b_rest)
    else:  # Triton compiles what follows a return, even one that is always reached
        return (b_x,)


@triton.jit
def _load_both(rows, others, first, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr):
    """Two tiles as `_load_rows` gives them, by descriptors. Nothing is done with one before the other is asked for: so
    Triton's pipeline lets all their copies arrive at one barrier, which costs fewer instructions than two."""
    x, x_rest, _stride, start, length, head = rows
    y, y_rest, _other_stride, _start, _length, _head = others
    billion, end, row = to_ragged_indices(start, length, first)
    b_x = x.load([billion, end, row, head, 0])
    b_y = y.load([billion, end, row, head, 0])
    if BLOCK_E > 0:
        b_u = x_rest.load([billion, end, row, head, BLOCK_D])
        b_v = y_rest.load([billion, end, row, head, BLOCK_D])
        b_x = (b_x.reshape(BLOCK, BLOCK_D), b_u.reshape(BLOCK, BLOCK_E))
        return b_x, (b_y.reshape(BLOCK, BLOCK_D), b_v.reshape(BLOCK, BLOCK_E))
    else:
        return (b_x.reshape(BLOCK, BLOCK_D),), (b_y.reshape(BLOCK, BLOCK_D),)


@triton.jit
def _load_columns(p_row, m_row, FIRST: tl.constexpr, MASKED: tl.constexpr, HEAD_DIM: tl.constexpr,
                  BLOCK: tl.constexpr):  # fmt: skip
    """Columns FIRST … FIRST + BLOCK, with the masks that matter and no other."""
    o_d = FIRST + tl.arange(0, BLOCK)
    m_d = (o_d < HEAD_DIM)[None, :]
    p_tile = p_row + o_d[None, :]
    if HEAD_DIM < FIRST + BLOCK and MASKED:
        b_x = tl.load(p_tile, mask=m_d & m_row[:, None], other=0.0)
    elif HEAD_DIM < FIRST + BLOCK:
        b_x = tl.load(p_tile, mask=m_d, other=0.0)
    elif MASKED:
        b_x = tl.load(p_tile, mask=m_row[:, None], other=0.0)
    else:
        b_x = tl.load(p_tile)
    return b_x


@triton.jit
def _store_rows(rows, first, b_x, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
                BLOCK_E: tl.constexpr):  # fmt: skip
    """Write rows first … first + BLOCK of a sequence, those that exist, by pointers and in their dtype."""
    x, _x_rest, stride, _start, length, _head = rows
    o_row = tl.arange(0, BLOCK)
    m_row = (first + o_row < length)[:, None]
    p_row = x + (first + tl.full((), 0, tl.int64)) * stride + o_row[:, None] * stride
    o_d = tl.arange(0, BLOCK_D)[None, :]
    tl.store(p_row + o_d, b_x[0].to(x.dtype.element_ty), mask=m_row & (o_d < HEAD_DIM))
    if BLOCK_E > 0:
        o_e = BLOCK_D + tl.arange(0, BLOCK_E)[None, :]
        tl.store(p_row + o_e, b_x[1].to(x.dtype.element_ty), mask=m_row & (o_e < HEAD_DIM))


@triton.jit
def _zeros(BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr):
    """An accumulator of a tile of rows."""
    b_x = tl.zeros((BLOCK, BLOCK_D), dtype=tl.float32)
    if BLOCK_E > 0:
        return (b_x, tl.zeros((BLOCK, BLOCK_E), dtype=tl.float32))
    else:
        return (b_x,)


@triton.jit
def _times(b_x, factor, BLOCK_E: tl.constexpr):
    """A tile of rows times a scalar or a column."""
    if BLOCK_E > 0:
        return (b_x[0] * factor, b_x[1] * factor)
    else:
        return (b_x[0] * factor,)


@triton.jit
def _inner(b_x, b_y, PRECISION: tl.constexpr, BLOCK_E: tl.constexpr, b_first=None):
    """x·yᵀ of two tiles of rows, and b_first where there is one."""
    b_s = tl.dot(b_x[0], tl.trans(b_y[0]), b_first, input_precision=PRECISION)
    if BLOCK_E > 0:
        b_s = tl.dot(b_x[1], tl.trans(b_y[1]), b_s, input_precision=PRECISION)
    return b_s


@triton.jit
def _add_product(b_acc, b_p, b_x, PRECISION: tl.constexpr, BLOCK_E: tl.constexpr):
    """acc + p·x, for a tile of rows x; p is rounded to its dtype."""
    b_p = b_p.to(b_x[0].dtype)
    b_first = tl.dot(b_p, b_x[0], b_acc[0], input_precision=PRECISION)
    if BLOCK_E > 0:
        return (b_first, tl.dot(b_p, b_x[1], b_acc[1], input_precision=PRECISION))
    else:
        return (b_first,)


@triton.jit
def _scores(b_q, b_k, scale, softcap, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, BLOCK_E: tl.constexpr):
    """Logits before the factor of `_exponent_scale`: q·kᵀ, or capped. Rows of q, rows of k → [BQ, BK]."""
    b_s = _inner(b_q, b_k, PRECISION, BLOCK_E)
    if HAS_SOFTCAP:
        b_s = tanh(b_s * (scale / softcap), b_q[0].dtype == tl.float32)
    return b_s


@triton.jit
def _exponent_scale(scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """The one factor from `_scores` to a power of two: the scale (or the cap) folded with log2 e."""
    if HAS_SOFTCAP:
        return softcap * LOG2_E
    return scale * LOG2_E


@triton.jit
def _exponents(b_s, b_shift, factor, EXACT: tl.constexpr):
    """Powers of two from `_scores` and a number a row, which broadcasts.

    That number is one of exponents, added as the scores are multiplied. EXACT: it is one of scores, added first; so
    equal scores come out as 0, however large they are (an exponent of 10,000 is known to 1e-3 in float32).
    """
    if EXACT:
        return (b_s + b_shift) * factor
    else:
        return tl.fma(b_s, factor, b_shift)


@triton.jit
def _visible(o_q, o_k, length, window, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """Which keys each query attends to, from positions within the sequence that broadcast. → bool"""
    m_s = o_k < length
    distance = o_q - o_k
    if HAS_WINDOW:
        # Both sides in one comparison: what lies before the window wraps to a large unsigned number.
        before = window * (not CAUSAL)
        m_s = m_s & ((distance + before).to(tl.uint32) <= (window + before).to(tl.uint32))
    elif CAUSAL:
        m_s = m_s & (distance >= 0)
    return m_s


@triton.jit
def _kept(random, o_q, first_k, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """Which weights dropout keeps, as `dropout.Dropout.factors` defines it: eight keys a counter. → [BQ, BK] bool."""
    seed, threshold, _gain, sequence, head = random
    o_word = first_k // 8 + tl.arange(0, BLOCK_K // 8)
    zero = o_q[:, None] * 0 + o_word[None, :] * 0
    # [BLOCK_Q, BLOCK_K // 8]
    b_0, b_1, b_2, b_3 = tl.philox(seed, o_q[:, None] + zero, o_word[None, :] + zero, head + zero, sequence + zero,
                                   DROPOUT_ROUNDS)  # fmt: skip
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
def _masked_tile(step, full_low, skipped, HAS_TWO_SIDES: tl.constexpr):
    """Where a masked tile lies: those before and after the full ones are one loop, for a second copy of the code would
    cost registers."""
    if HAS_TWO_SIDES:
        return tl.where(step < full_low, step, step + skipped)
    return step + skipped
