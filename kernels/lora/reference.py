"""The definition."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def lora_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scaling: float, dropout_p: float
) -> Tensor:
    dropped = F.dropout(x, dropout_p)
    return F.linear(x, weight, bias) + scaling * F.linear(F.linear(dropped, down.to(x.dtype)), up.to(x.dtype))
