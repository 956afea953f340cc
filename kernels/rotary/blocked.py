"""Rotary position embedding in three passes over memory, where the definition takes six."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate_blocked(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (…, D); cos and sin (…, w), broadcast over heads → (…, D), without a gradient."""
    x, width = x.detach(), cos.shape[-1]
    half = width // 2
    if width < x.shape[-1]:
        out = x.clone()
        out[..., :width] *= cos
    else:
        out = torch.mul(x, cos)
    out[..., :half].addcmul_(x[..., half:width], sin[..., :half], value=-1)
    out[..., half:width].addcmul_(x[..., :half], sin[..., half:])
    return out
