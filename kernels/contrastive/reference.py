"""The definition of the contrastive loss: short, for any dtype up to float64, differentiable. Tests trust it.

It is also the fastest way at small batch sizes, where the whole matrix of similarities fits into the caches.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .rule import Rule, limit_of, marks_of, same, unit_rows


def contrastive_reference(
    queries: Tensor,
    documents: Tensor,
    scale: Tensor,
    positives: Tensor | None,
    ids: Tensor | None,
    known: Tensor | None,
    guide: tuple[Tensor, Tensor] | None,
    rule: Rule,
) -> Tensor:
    """(N, d), (M, d) → (N,) losses, from the whole matrix of similarities at once."""
    rows = torch.arange(queries.shape[0], device=queries.device)
    plain = positives is None and ids is None
    positives = rows if positives is None else positives
    marks, query_marks = marks_of(documents, positives, ids, known)
    if rule.cosine:
        queries, documents = unit_rows(queries), unit_rows(documents)
    similarity = _wide(queries @ documents.T)
    # What a limit compares: the guide's rows, or the rows themselves.
    guides = (queries, documents) if guide is None else tuple(unit_rows(x.to(scale.dtype)) for x in guide)
    compared = similarity.detach() if guide is None else _wide(guides[0] @ guides[1].T)
    own = compared[rows, positives]
    limit = None
    if rule.margin is not None:
        compared_rows = (guides[0].detach(), guides[1].detach()[positives])
        lengths = (torch.linalg.vector_norm(x, dim=1, dtype=own.dtype) for x in compared_rows)
        limit = limit_of(own, rule.margin, math.prod(lengths))
    scores = similarity * scale  # before anything is masked: 0 · −inf in the gradient of the scale would be NaN
    if not plain or limit is not None:
        hidden = _hidden(query_marks, marks, compared, limit)
        scores = scores.masked_fill(hidden.index_put((rows, positives), hidden.new_zeros(())), float("-inf"))
    if rule.query_negatives:
        scores = torch.cat([scores, _between(queries, guides[0], query_marks, limit, scale)], dim=1)
    if not rule.columns:
        return F.cross_entropy(scores, positives, reduction="none")
    anchors = similarity[:, positives].T
    column_limit = None
    if limit is not None:  # a document with several queries goes by the one most similar to it
        lowest = own.new_full(marks.shape[:1], float("-inf"))
        column_limit = lowest.scatter_reduce(0, positives, limit, "amax")[positives]
    hidden = _hidden(marks[positives], query_marks, compared[:, positives].T, column_limit)
    hidden.fill_diagonal_(False)
    backwards = (anchors * scale).masked_fill(hidden, float("-inf"))
    if rule.document_negatives:
        more = _between(documents[positives], guides[1][positives], query_marks, limit, scale)
        return F.cross_entropy(torch.cat([scores, backwards, more], dim=1), positives, reduction="none")
    losses, others = (F.cross_entropy(x, y, reduction="none") for x, y in ((scores, positives), (backwards, rows)))
    return (losses + others) / 2


def _between(x: Tensor, guide: Tensor, marks: Tensor, limit: Tensor | None, scale: Tensor) -> Tensor:
    """(n, n) scores of unit rows (n, d) among themselves, −inf where these are no negatives."""
    compared = _wide(guide @ guide.T)
    return (_wide(x @ x.T) * scale).masked_fill(_hidden(marks, marks, compared, limit), float("-inf"))


def _hidden(row_marks: Tensor, column_marks: Tensor, similarity: Tensor, limit: Tensor | None) -> Tensor:
    """(rows, columns) bool: entries that are no negatives."""
    hidden = same(row_marks, column_marks)
    return hidden if limit is None else hidden | (similarity > limit[:, None])


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
