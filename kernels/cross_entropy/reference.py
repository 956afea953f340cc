"""The definition of the loss: every logit at once, any dtype up to float64, differentiable. Tests trust it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .rule import Rule, Statistics


def statistics_reference(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, rule: Rule) -> Statistics:
    """Labelled rows (N, d), weight (V, d), labels (N,) → what their losses are made of."""
    logits = F.linear(hidden, weight, bias).to(torch.promote_types(hidden.dtype, torch.float32))
    if rule.softcap is not None:
        logits = rule.softcap * torch.tanh(logits / rule.softcap)
    label = logits.gather(1, labels[:, None])[:, 0]
    total = logits.sum(1) if rule.smoothing else None
    return Statistics(logits.logsumexp(1), label, total, logits.detach().amax(1))
