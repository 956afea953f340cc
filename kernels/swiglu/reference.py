"""The definition of the gate of a gated MLP."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {"silu": F.silu, "gelu_tanh": partial(F.gelu, approximate="tanh")}


def swiglu_reference(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """gate and up (…, d) → (…, d)."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    return (ACTIVATIONS[activation](gate.to(wide)) * up).to(gate.dtype)
