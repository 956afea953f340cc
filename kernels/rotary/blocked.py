"""Rotary position embedding in three passes over memory, where the definition takes six."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate_blocked(x: Tensor, cos: Tensor, sin: Tensor, transposed: bool = False) -> Tensor:
    """x (…, D); cos and sin (…, w), broadcast over heads → (…, D), without a gradient.

    ``transposed`` applies the transposed matrix of each pair, which is what a gradient goes through.
    """
    width, out = cos.shape[-1], like(x)
    turned, result = x, out
    if width < x.shape[-1]:
        turned, result = x[..., :width], out[..., :width]
        out[..., width:] = x[..., width:]
    torch.mul(turned, cos, out=result)
    (first, second), (to_first, to_second) = turned.chunk(2, -1), result.chunk(2, -1)
    sin_first, sin_second = reversed(sin.chunk(2, -1)) if transposed else sin.chunk(2, -1)
    sign = -1 if transposed else 1
    to_first.addcmul_(second, sin_first, value=-sign)
    to_second.addcmul_(first, sin_second, value=sign)
    return out


def like(x: Tensor) -> Tensor:
    """New memory for a result: in x's order in memory, where that keeps the elements of a head together."""
    out = torch.empty_like(x)
    return out if out.stride(-1) == 1 else x.new_empty(x.shape)
