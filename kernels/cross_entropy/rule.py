"""What the loss of a row is: the one formula that every backend computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Statistics(NamedTuple):
    """What a row's loss is made of, each (N,) float32 (float64 for float64)."""

    lse: Tensor  # log-sum-exp of the logits
    label: Tensor  # the label's logit; NaN where the label is not among these entries
    total: Tensor | None  # sum of the logits, where labels are smoothed
    highest: Tensor | None  # the highest logit, where accuracy was asked for

    @staticmethod
    def joined(parts: Sequence[Statistics]) -> Statistics:
        """The statistics of consecutive blocks of rows, as one."""
        return Statistics(*(None if columns[0] is None else torch.cat(columns) for columns in zip(*parts, strict=True)))


@dataclass(frozen=True)
class Rule:
    """How a row's loss follows from its logits x, which softcap has already bent.

    loss = lse − (1 − ε)·x[label] − ε/V·Σx + z·lse², with ε the label smoothing and V the whole vocabulary's size.
    """

    softcap: float | None
    smoothing: float
    z_loss: float
    vocabulary: int

    def losses(self, statistics: Statistics) -> Tensor:
        """(N,) losses."""
        loss = statistics.lse - (1 - self.smoothing) * statistics.label
        if statistics.total is not None:
            loss = loss - self.smoothing / self.vocabulary * statistics.total
        return loss + self.z_loss * statistics.lse.square() if self.z_loss else loss

    def softmax_factor(self, grad: Tensor, lse: Tensor) -> Tensor:
        """(N,): what the softmax is multiplied by in the gradient of the logits, for rows with upstream ``grad``."""
        return grad * (1 + 2 * self.z_loss * lse) if self.z_loss else grad


@dataclass(frozen=True)
class Problem:
    """The labelled rows of one call, and the part of the vocabulary that this process holds."""

    hidden: Tensor  # (T, d)
    weight: Tensor  # (V, d)
    bias: Tensor | None  # (V,)
    rows: Tensor  # (N,) which rows of hidden have a label, ascending
    labels: Tensor  # (N,) int64; a label outside 0 … V − 1 belongs to another process
    rule: Rule

    @property
    def accumulator(self) -> torch.dtype:
        """The dtype of sums and softmax."""
        return torch.promote_types(self.hidden.dtype, torch.float32)

    def taken(self, block: slice) -> Tensor:
        """(n, d): a block of the labelled rows; a view where every row has a label."""
        if self.rows.shape[0] == self.hidden.shape[0]:
            return self.hidden[block]
        return self.hidden.index_select(0, self.rows[block])


@dataclass(frozen=True)
class Gradients:
    """Where gradients are written; None: not wanted."""

    hidden: Tensor | None = None  # (T, d), zeros on rows without a label; may be wider than the hidden states
    weight: Tensor | None = None  # (V, d)
    bias: Tensor | None = None  # (V,)
