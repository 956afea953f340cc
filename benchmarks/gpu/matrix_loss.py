"""Softmax cross-entropy of rows against a large matrix, by blocks: what fused losses over it are compared with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 1024


@dataclass(frozen=True)
class MatrixLoss:
    """Mean of −log softmax(scale · rows · matrixᵀ)[target], its gradients, and the loss of each row.

    Attributes:
        row_losses: (n,), float32 or float64.
        rows: (n, d) gradient of the mean in the rows.
        matrix: (m', d) gradient of the mean in every ``stride``-th row of the matrix.
    """

    row_losses: Tensor
    rows: Tensor
    matrix: Tensor


def matrix_loss(rows: Tensor, matrix: Tensor, targets: Tensor, scale: float = 1.0, stride: int = 1) -> MatrixLoss:
    """rows (n, d), matrix (m, d), targets (n,). Products in their dtype, softmax and sums in float32 (or float64)."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    losses, gradients = [], []
    matrix_gradient = torch.zeros_like(matrix[::stride], dtype=wide)
    for block, wanted in zip(rows.split(BLOCK), targets.split(BLOCK), strict=True):
        scores = (block @ matrix.T).to(wide) * scale
        losses.append(torch.nn.functional.cross_entropy(scores, wanted, reduction="none"))
        weights = scores.softmax(1)
        weights[torch.arange(len(wanted), device=weights.device), wanted] -= 1
        weights = (weights * (scale / len(rows))).to(rows.dtype)
        gradients.append(weights @ matrix)
        matrix_gradient += (weights[:, ::stride].T @ block).to(wide)
    return MatrixLoss(torch.cat(losses), torch.cat(gradients), matrix_gradient.to(rows.dtype))


def plain_mean(plain: MatrixLoss, exact: MatrixLoss) -> Tensor:
    """The exact mean loss, off by what a row of ``plain`` is off: in a mean, errors may cancel by luck alone."""
    error = (plain.row_losses.double() - exact.row_losses).square().mean().sqrt()
    return (exact.row_losses.mean() + error).to(plain.row_losses.dtype)
