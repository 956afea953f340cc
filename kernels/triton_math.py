"""Functions that Triton's portable language lacks."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# A point that float32 holds exactly, as it does (to 1e-9) its tanh.
MIDDLE = tl.constexpr(0.783203125)
TANH_MIDDLE = tl.constexpr(0.6545413742720325)


@triton.jit
def tanh(x, PRECISE: tl.constexpr):
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
