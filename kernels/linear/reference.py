"""The definition of a linear layer with an activation or a multiplier."""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh")}


def linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, activation: str | None, multiplier: Tensor | None
) -> Tensor:
    """x (…, in), weight (out, in) → (…, out)."""
    out = F.linear(x, weight, bias)
    if activation is not None:
        out = ACTIVATIONS[activation](out)
    return out if multiplier is None else out * multiplier
