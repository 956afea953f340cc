"""The definition of the contrastive loss: short, for any dtype up to float64, differentiable. Tests trust it.

It is also the fastest way at small batch sizes, where the whole matrix of similarities fits into the caches.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .rule import Rule, marks_of, same


def contrastive_reference(
    queries: Tensor,
    documents: Tensor,
    scale: Tensor,
    positives: Tensor | None,
    ids: Tensor | None,
    known: Tensor | None,
    rule: Rule,
) -> Tensor:
    """(N, d), (M, d) → (N,) losses, from the whole matrix of similarities at once."""
    rows = torch.arange(queries.shape[0], device=queries.device)
    plain = positives is None and ids is None
    positives = rows if positives is None else positives
    marks, of_queries = marks_of(documents, positives, ids, known)
    if rule.cosine:
        queries, documents = unit_rows(queries), unit_rows(documents)
    similarity = _wide(queries @ documents.T)
    own = similarity[rows, positives].detach()
    limit = None if rule.margin is None else own + rule.margin
    scores = similarity * scale  # before anything is masked: 0 · −inf in the gradient of the scale would be NaN
    if not plain or limit is not None:
        hidden = _hidden(of_queries, marks, similarity, limit)
        scores = scores.masked_fill(hidden.index_put((rows, positives), hidden.new_zeros(())), float("-inf"))
    if rule.query_negatives:
        scores = torch.cat([scores, _between(queries, of_queries, limit, scale)], dim=1)
    if not rule.columns:
        return F.cross_entropy(scores, positives, reduction="none")
    anchors = similarity[:, positives].T
    column_limit = None
    if limit is not None:  # a document with several queries goes by the one most similar to it
        lowest = own.new_full(marks.shape[:1], float("-inf"))
        column_limit = lowest.scatter_reduce(0, positives, limit, "amax")[positives]
    hidden = _hidden(marks[positives], of_queries, anchors, column_limit)
    hidden.fill_diagonal_(False)
    backwards = (anchors * scale).masked_fill(hidden, float("-inf"))
    if rule.document_negatives:
        more = _between(documents[positives], of_queries, limit, scale)
        return F.cross_entropy(torch.cat([scores, backwards, more], dim=1), positives, reduction="none")
    losses, others = (F.cross_entropy(x, y, reduction="none") for x, y in ((scores, positives), (backwards, rows)))
    return (losses + others) / 2


def _between(x: Tensor, marks: Tensor, limit: Tensor | None, scale: Tensor) -> Tensor:
    """(n, n) scores of unit rows (n, d) among themselves, −inf where these are no negatives."""
    similarity = _wide(x @ x.T)
    return (similarity * scale).masked_fill(_hidden(marks, marks, similarity, limit), float("-inf"))


def unit_rows(x: Tensor) -> Tensor:
    """Rows of length one; a row of zeros stays zero and has no gradient."""
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    empty = length == 0
    return x * ((~empty) / length.masked_fill(empty, 1))


def _hidden(row_marks: Tensor, column_marks: Tensor, similarity: Tensor, limit: Tensor | None) -> Tensor:
    """(rows, columns) bool: entries that are no negatives."""
    hidden = same(row_marks, column_marks)
    return hidden if limit is None else hidden | (similarity > limit[:, None])


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
