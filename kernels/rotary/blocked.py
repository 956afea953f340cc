"""Rotary position embedding in three passes over memory, where the definition takes six."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate_blocked(x: Tensor, cos: Tensor, sin: Tensor, transposed: bool = False) -> Tensor:
    """x (…, D); cos and sin (…, w), broadcast over heads → (…, D), without a gradient.

    ``transposed`` applies the transposed matrix of each pair, which is what a gradient goes through.
    """
    width = cos.shape[-1]
    half = width // 2
    out = like(x)
    torch.mul(x[..., :width], cos, out=out[..., :width])
    if width < x.shape[-1]:
        out[..., width:] = x[..., width:]
    sign = -1 if transposed else 1
    to_first, to_second = (sin[..., half:], sin[..., :half]) if transposed else (sin[..., :half], sin[..., half:])
    out[..., :half].addcmul_(x[..., half:width], to_first, value=-sign)
    out[..., half:width].addcmul_(x[..., :half], to_second, value=sign)
    return out


def like(x: Tensor) -> Tensor:
    """New memory for a result: in x's order in memory, where that keeps the elements of a head together."""
    out = torch.empty_like(x)
    return out if out.stride(-1) == 1 else x.new_empty(x.shape)
