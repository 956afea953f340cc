"""The definition of rotary position embedding."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (…, D); cos and sin (…, w), broadcast over heads → (…, D)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    turned, rest = x[..., : cos.shape[-1]].to(wide), x[..., cos.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned.to(x.dtype), rest), dim=-1)
