"""Matrix products of the blocked path: batched by PyTorch, or large float32 ones one by one through oneDNN.

PyTorch hands float32 products to MKL, which on AMD processors runs at half or a third of what oneDNN reaches there. Its
binding of oneDNN for linear layers takes one product at a time, and a call costs ten microseconds.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..products import goes_through_onednn
from ..products import product as single_product

# Measured on 2 Zen 5 cores. From so many multiplications on, one call of oneDNN is faster than MKL; and from so many
# scores a step on, products through oneDNN are faster than PyTorch's flash attention.
LEAST_MULTIPLICATIONS = 4 * 1024 * 1024
LEAST_SCORES = 128 * 1024


def product(a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """(n, r, k) · (n, k, c) · scale → (n, r, c)."""
    if a.shape[0] != 1 or not runs_alone(a, a.shape[1] * a.shape[2] * b.shape[2]):
        return torch.bmm(a, b) if scale == 1 else torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=scale)
    if scale == 1:
        return single_product(a[0], b[0])[None]
    if a.shape[2] < b.shape[2]:  # of a and the result, a is smaller
        return single_product(a[0] * scale, b[0])[None]
    return single_product(a[0], b[0])[None].mul_(scale)


def runs_alone(like: Tensor, multiplications: int) -> bool:
    """Whether a product of so many multiplications is faster as a call of oneDNN of its own."""
    return multiplications >= LEAST_MULTIPLICATIONS and goes_through_onednn(like)


def least_length_alone(shared: int, query_block: int) -> int:
    """The shortest sequence of which a step, ``query_block`` queries of ``shared`` heads, has LEAST_SCORES."""
    length = math.ceil(LEAST_SCORES / (shared * query_block))
    return length if length >= query_block else math.ceil(math.sqrt(LEAST_SCORES / shared))
