"""What the loss is made of: the rule, and the rows on either side of the matrix of similarities."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..products import blocks

# Rows are normalised, and gradients finished, this many bytes of float32 at a time: they stay in cache.
BLOCK_BYTES = 2**20
LN_2 = math.log(2)
ROUNDINGS = 8  # 1e-6 of a float32 cosine
NO_ID = -1  # what ``known`` is filled up with
# Rows of a length between these have squares that float32 can add up.
PLAIN_LENGTHS = (1e-15, 1e15)


@dataclass(frozen=True)
class Rule:
    """Which similarity, which directions, and what is no negative.

    With z = scale · similarity, p(i) the positive of row i, and one mark or more on every row:

        loss(i) = log(1 + e^(R(i) − z(i, p(i)))),  R(i) = log Σ e^z over the negatives of row i

    A negative of row i is a document (or query, with query_negatives) that has no mark in common with it and whose
    similarity (by the guide, if there is one) is at most that of the positive plus the margin. In the other direction
    (symmetric), the negatives of document p(i) are queries. With document_negatives these, and the other rows'
    documents as compared with p(i), are negatives of row i too, and the positive counts once in either direction:
    log(2 + e^(R(i) − z(i, p(i)))).
    """

    cosine: bool
    symmetric: bool
    query_negatives: bool
    document_negatives: bool
    margin: float | None
    bounded: bool = False  # |scale| ≤ BOUNDED_SCALE and |similarity| ≤ 1: e^z fits float32 without a running maximum

    @property
    def plain(self) -> bool:
        """One direction, and every other document is a negative, but those of the same mark."""
        return not self.columns and not self.query_negatives and self.margin is None

    @property
    def columns(self) -> bool:
        """Whether documents look for queries, too."""
        return self.symmetric or self.document_negatives


# e^60 · 2²⁰ columns and e^−60 both lie well within float32.
BOUNDED_SCALE = 60.0


class LogSum(NamedTuple):
    """The logarithm of a sum of exponentials, peak + rest: the difference of two large ones loses nothing.

    As one float32 a logarithm near 1,000 is known to 6e-5, and so would every weight e^(z − lse) be.
    """

    peak: Tensor  # (n,) the largest term, or anything near it; finite
    rest: Tensor  # (n,) what the logarithm is more than that; −inf for the empty sum

    @staticmethod
    def empty(like: Tensor, count: int) -> LogSum:
        """The sum of nothing, ``count`` times."""
        lowest = torch.finfo(like.dtype).min / 2  # the difference of two peaks is finite too
        return LogSum(like.new_full((count,), lowest), like.new_full((count,), float("-inf")))

    @staticmethod
    def joined(peaks: Tensor, rests: Tensor) -> LogSum:
        """The logarithm of sums over parts: (parts, n) each → (n,)."""
        peak = peaks.amax(0)
        return LogSum(peak, (peaks - peak + rests).logsumexp(0))

    def plus(self, other: LogSum) -> LogSum:
        """The logarithm of both sums together."""
        return LogSum.joined(torch.stack([self.peak, other.peak]), torch.stack([self.rest, other.rest]))

    def above(self, z: Tensor) -> Tensor:
        """(n,) the logarithm minus z."""
        return self.peak - z + self.rest


@dataclass(frozen=True)
class Side:
    """Rows on one side of the matrix, and what they bring to its entries. Tensors are (n,) unless told."""

    rows: Tensor  # (n, d)
    inverse: Tensor | None  # 1 / length of a row as the user gave it; None: rows are used as they are
    stretch: Tensor | None  # what a row as it lies here is multiplied by to have length one; None: nothing
    marks: Tensor  # (n, k): an entry whose row and column have a mark in common is no negative
    first: int | None = None  # k is 1 and the marks count up from here; None: anything
    limit: Tensor | None = None  # the highest similarity of a negative, by the guide if there is one
    peak: Tensor | None = None  # the logarithm of the softmax denominator is peak + rest
    rest: Tensor | None = None
    weight: Tensor | None = None  # what a softmax weight is multiplied by in the gradient of the similarity
    guide: Tensor | None = None  # (n, g) unit rows of another model, whose similarities limits are of

    @property
    def count(self) -> int:
        """Rows."""
        return self.rows.shape[0]

    @property
    def accumulator(self) -> torch.dtype:
        """The dtype of sums."""
        return torch.promote_types(self.rows.dtype, torch.float32)

    def part(self, rows: slice) -> Side:
        """Some of the rows."""
        sliced = {name: None if x is None else x[rows] for name, x in self.tensors().items()}
        first = None if self.first is None else self.first + rows.start
        return replace(self, first=first, **sliced)

    def tensors(self) -> dict[str, Tensor | None]:
        """Everything that has rows, by name."""
        more = {name: getattr(self, name) for name in ("marks", "limit", "peak", "rest", "weight")}
        return {**self.embeddings(), **more}

    def embeddings(self) -> dict[str, Tensor | None]:
        """The rows, their lengths and the guide's, by name."""
        return {name: getattr(self, name) for name in ("rows", "inverse", "stretch", "guide")}

    def unit(self, rows: slice | Tensor) -> Tensor:
        """(k, d) of the accumulator's dtype: rows as the similarity sees them; a copy, unless they are that already."""
        x = self.rows[rows].to(self.accumulator)
        return x if self.stretch is None else x * self.stretch[rows][:, None]


def marks_of(
    documents: Tensor, positives: Tensor, ids: Tensor | None, known: Tensor | None, first: int = 0
) -> tuple[Tensor, Tensor]:
    """Marks of the documents (M, 1), and of the queries (N, 1 + K): its own document's, and what is known to suit it.

    Documents are numbered from ``first``: the numbers are their marks where there are no ids.
    """
    count, device = documents.shape[0], documents.device
    marks = torch.arange(first, first + count, device=device, dtype=torch.int32) if ids is None else ids.contiguous()
    marks = marks[:, None]
    own = marks[positives]
    return marks, own if known is None else torch.cat([own, torch.where(known == NO_ID, own, known)], dim=1)


def limit_of(own: Tensor, margin: float, lengths: Tensor | float) -> Tensor:
    """(n,) the highest similarity of a negative: the positive's and the margin, and what rounding may add.

    A text that is in the batch twice is exactly as similar, but other code sums up its products in another order.
    ``lengths`` of both rows, multiplied, are the size of those products.
    """
    return own + (margin + ROUNDINGS * torch.finfo(own.dtype).eps * lengths)


def same(x: Tensor, y: Tensor) -> Tensor:
    """(n, m) bool: which rows of x (n, k) and of y (m, l) have a number in common."""
    first, *others = itertools.product(x.unbind(1), y.unbind(1))
    found = first[0][:, None] == first[1]
    for a, b in others:
        found |= a[:, None] == b
    return found


def row_blocks(x: Tensor) -> Iterator[slice]:
    """The rows of x in slices of BLOCK_BYTES of float32."""
    return blocks(x.shape[0], rows_a_block(x.shape[1]))


def rows_a_block(width: int) -> int:
    """How many rows BLOCK_BYTES of float32 hold."""
    return max(1, BLOCK_BYTES // (4 * max(1, width)))


def unit_rows(x: Tensor) -> Tensor:
    """Rows of length one; a row of zeros stays zero and has no gradient."""
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    empty = length == 0
    return x * ((~empty) / length.masked_fill(empty, 1))


def inverse_lengths(x: Tensor) -> Tensor:
    """(n, 1) of x's dtype: 1 / length of each row (n, d) of float32 or float64; 0 for a row of zeros."""
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    least, most = (float(extreme) for extreme in length.aminmax())
    if not PLAIN_LENGTHS[0] < least <= most < PLAIN_LENGTHS[1]:
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float64)
    return length.reciprocal_().to(x.dtype).nan_to_num_(nan=torch.nan, posinf=0.0)


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x), exact at any x: from 50 on it is x to the last bit of float64 too."""
    return F.softplus(x, threshold=50.0)
