"""Forward and backward pass over tiles, the same for every backend: what needs the matrix asks the backend's room.

A room (`blocked`, `triton`) offers `prepared`, `negative_sums`, `add_gradients` and PANEL_ROWS, see `blocked`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import import_module
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from .rule import LN_2, LogSum, Rule, Side, blocks, limit_of, marks_of, row_blocks, softplus, unit_rows


def room_of(backend: str) -> ModuleType:
    """The room of "blocked" or "triton"; Triton is imported only where it runs."""
    return import_module(f".{backend}", __package__)


@dataclass(frozen=True)
class Problem:
    """One call, prepared for its room."""

    queries: Side
    documents: Side
    positives: Tensor  # (N,) int64
    scale: Tensor  # () of the accumulator's dtype
    rule: Rule
    room: ModuleType

    def alike(self) -> list[Side]:
        """The sides whose rows are negatives of each other: the queries, and the document of each, as the rule says."""
        found = [self.queries] if self.rule.query_negatives else []
        if self.rule.document_negatives:
            own = {name: x[self.positives] for name, x in self.documents.embeddings().items() if x is not None}
            found.append(replace(self.queries, **own))
        return found


class Saved(NamedTuple):
    """What the backward pass needs of the forward pass, float32 (float64 for float64)."""

    own: Tensor  # (N,) similarity of each query and its positive
    sums: Tensor  # (2, N) log Σ e^z over the negatives of each query, as LogSum
    column_sums: Tensor  # (2, M) the same for each document, or (2, 0)


class Gradients(NamedTuple):
    """None: not wanted."""

    queries: Tensor | None
    documents: Tensor | None
    scale: Tensor | None


def problem_of(
    queries: Tensor,
    documents: Tensor,
    scale: Tensor,
    positives: Tensor | None,
    ids: Tensor | None,
    known: Tensor | None,
    guide: tuple[Tensor, Tensor] | None,
    rule: Rule,
    backend: str,
    first: int = 0,
) -> Problem:
    """Documents are numbered from ``first``."""
    room, compared = room_of(backend), rule.margin is not None
    counted = first if ids is None else None
    in_order = torch.arange(queries.shape[0], device=queries.device) if positives is None else positives
    marks, query_marks = marks_of(documents, in_order, ids, known, first)
    sides = (
        Side(*room.prepared(queries, rule.cosine, compared), query_marks, counted if positives is None else None),
        Side(*room.prepared(documents, rule.cosine, compared), marks, counted),
    )
    if guide is not None:
        sides = (replace(side, guide=unit_rows(x.to(scale.dtype))) for side, x in zip(sides, guide, strict=True))
    return Problem(*sides, in_order, scale, rule, room)


def own_similarity(problem: Problem) -> Tensor:
    """(N,) similarity of each query and its positive, from the rows that the tiles use."""
    own = problem.queries.rows.new_empty(problem.queries.count, dtype=problem.queries.accumulator)
    for block in row_blocks(problem.queries.rows):
        documents = problem.documents.unit(problem.positives[block])
        own[block] = (problem.queries.unit(block) * documents).sum(1)
    return own


def with_limits(problem: Problem, own: Tensor) -> Problem:
    """The problem with the highest similarity that a negative of each query and of each document may have."""
    if problem.rule.margin is None:
        return problem
    documents, by, lengths = problem.documents, problem.queries.guide, 1.0
    if by is not None:
        own = (by * documents.guide[problem.positives]).sum(1)
    elif not problem.rule.cosine:
        sides = (problem.queries, documents)
        of_queries, of_documents = (torch.linalg.vector_norm(x.rows, dim=1, dtype=own.dtype) for x in sides)
        lengths = of_queries * of_documents[problem.positives]
    limit = limit_of(own, problem.rule.margin, lengths)
    if problem.rule.columns:
        column_limit = limit.new_full((documents.count,), float("-inf"))
        documents = replace(documents, limit=column_limit.scatter_reduce(0, problem.positives, limit, "amax"))
    return replace(problem, queries=replace(problem.queries, limit=limit), documents=documents)


def losses_of(problem: Problem, saved: Saved) -> Tensor:
    """(N,) losses: log(1 + e^x) rather than a difference of logarithms, which a small loss would not survive."""
    z = saved.own * problem.scale
    if problem.rule.document_negatives:
        return softplus(LogSum(*saved.sums).above(z + LN_2)) + LN_2
    losses = softplus(LogSum(*saved.sums).above(z))
    if not problem.rule.symmetric:
        return losses
    return (losses + softplus(LogSum(*saved.column_sums[:, problem.positives]).above(z))) / 2


def forward(problem: Problem) -> tuple[Tensor, Saved]:
    """Losses (N,), and what the backward pass needs."""
    own = own_similarity(problem)
    problem = with_limits(problem, own)
    rule, queries, room = problem.rule, problem.queries, problem.room
    sums, column_sums = room.negative_sums(queries, problem.documents, problem.scale, rule.columns, rule.bounded)
    for side in problem.alike():
        sums = sums.plus(room.negative_sums(side, side, problem.scale, False, rule.bounded)[0])
    saved = saved_of(problem, own, sums, None if column_sums is None else torch.stack(column_sums))
    return losses_of(problem, saved), saved


def saved_of(problem: Problem, own: Tensor, sums: LogSum, column_sums: Tensor | None) -> Saved:
    """What is kept of the sums over the negatives of queries (n,) and documents (2, m)."""
    if problem.rule.document_negatives:
        sums, column_sums = sums.plus(LogSum(*column_sums[:, problem.positives])), None
    return Saved(own, torch.stack(sums), own.new_empty((2, 0)) if column_sums is None else column_sums)


@dataclass(frozen=True)
class Weighted:
    """A problem whose sides carry weights for the backward pass, and what these were divided by.

    Weights are at most 1, whatever the reduction: a tile of float16 would lose those of a mean over many rows.
    """

    problem: Problem
    positive_gradient: Tensor  # (N,) gradient of the logit of each query's positive, divided by peak
    peak: Tensor  # ()


def weighted(problem: Problem, saved: Saved, grad: Tensor, peak: Tensor | None = None) -> Weighted:
    """Softmax denominators and weights for upstream gradients ``grad`` (N,) of the losses."""
    problem = with_limits(problem, saved.own)
    peak = largest(grad) if peak is None else peak
    weight = grad / peak * (0.5 if problem.rule.symmetric else 1.0)
    z = saved.own * problem.scale
    own, sums = LogSum(z, torch.zeros_like(z)), LogSum(*saved.sums)
    if problem.rule.document_negatives:  # it counts twice
        own = own._replace(rest=own.rest + LN_2)
    whole = sums.plus(own)
    queries = replace(problem.queries, peak=whole.peak, rest=whole.rest, weight=weight)
    positive = -weight * torch.sigmoid(sums.above(own.peak + own.rest))
    documents = problem.documents
    if problem.rule.symmetric:
        column_sums = LogSum(*saved.column_sums[:, problem.positives])
        positive = positive - weight * torch.sigmoid(column_sums.above(z))
        whole = column_sums.plus(own)
    if problem.rule.columns:
        # Several queries may share a document: their softmaxes differ by a factor only, so they add up to one.
        empty = z.new_full((documents.count,), torch.finfo(z.dtype).max / 2)
        peaks = empty.scatter_reduce(0, problem.positives, whole.peak, "amin")
        above = whole.peak - peaks[problem.positives] + whole.rest
        rests = empty.scatter_reduce(0, problem.positives, above, "amin")
        shares = weight * (rests[problem.positives] - above).exp()
        column_weight = add_at(z.new_zeros(documents.count), problem.positives, shares)
        documents = replace(documents, peak=peaks, rest=rests, weight=column_weight)
    return Weighted(replace(problem, queries=queries, documents=documents), positive, peak)


def largest(grad: Tensor) -> Tensor:
    """() the largest magnitude, 1 where all are zero."""
    peak = grad.abs().amax() if grad.shape[0] else grad.new_zeros(())
    return peak.masked_fill(peak == 0, 1)


def backward(problem: Problem, saved: Saved, grad: Tensor, like: Gradients) -> Gradients:
    """Gradients for upstream gradients ``grad`` (N,), in the dtypes of ``like``, whose None are not computed."""
    made = weighted(problem, saved, grad)
    problem = made.problem
    queries, documents, room, scale = problem.queries, problem.documents, problem.room, problem.scale
    out = None if like.queries is None else torch.empty_like(like.queries)
    into_documents = None if like.documents is None else zeros_for(documents)
    slope = scale.new_zeros(())
    alike = problem.alike()
    for panel in blocks(queries.count, room.PANEL_ROWS):
        part = queries.part(panel)
        into = None if out is None and like.scale is None else zeros_for(part)
        positives = (problem.positives[panel], made.positive_gradient[panel])
        room.add_gradients(part, documents, scale, positives, into, into_documents)
        if into is None:
            continue
        slope += alignment(part, into) if like.scale is not None else 0
        if problem.rule.query_negatives:
            room.add_gradients(part, queries, scale, None, into, None)
        # An entry between two queries is met from both: its share in the gradient of the scale counts half.
        slope += alignment(part, into) if like.scale is not None else 0
        if out is not None:
            finish(part, into, scale * made.peak, out[panel])
    if problem.rule.document_negatives and (into_documents is not None or like.scale is not None):
        into = zeros_for(alike[-1])
        for panel in blocks(queries.count, room.PANEL_ROWS):
            room.add_gradients(alike[-1].part(panel), alike[-1], scale, None, into[panel], None)
        slope += alignment(alike[-1], into) if like.scale is not None else 0
        if into_documents is not None:
            add_at(into_documents, problem.positives, into)
    if into_documents is not None:
        into_documents = finish(documents, into_documents, scale * made.peak, None, like.documents.dtype)
    return Gradients(out, into_documents, None if like.scale is None else slope / 2 * made.peak)


def zeros_for(side: Side, count: int | None = None) -> Tensor:
    """An accumulator for the gradient of a side's rows, or of ``count`` such rows."""
    return side.rows.new_zeros((side.count if count is None else count, side.rows.shape[1]), dtype=side.accumulator)


def alignment(side: Side, into: Tensor) -> Tensor:
    """() Σ x·g over rows x as the similarity sees them: how the loss changes with a factor on all of them."""
    total = into.new_zeros(())
    for block in row_blocks(into):
        total += (side.unit(block) * into[block]).sum()
    return total


def finish(
    side: Side, into: Tensor, factor: Tensor, out: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """Gradient of the rows as the user gave them, from that of unit rows; written to ``out``, or a new tensor.

    ``into`` is used up: a new tensor of its own dtype is ``into`` itself.
    """
    if out is None:
        out = into if dtype == into.dtype else into.new_empty(into.shape, dtype=dtype)
    for block in row_blocks(into):
        gradient = into[block].mul_(factor)
        if side.inverse is not None:
            unit = side.unit(block)
            along = (unit * gradient).sum(1, keepdim=True)
            gradient.addcmul_(unit, along, value=-1).mul_(side.inverse[block][:, None])
        if out is not into:
            out[block] = gradient
    return out


def add_at(out: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """``out`` (m, …) with the values (n, …) of each index (n,) added, in an order that is always the same."""
    # On a GPU index_add_ adds as it comes, index_put_ sorts; on a CPU it is the other way round.
    return out.index_add_(0, index, values) if out.device.type == "cpu" else out.index_put_((index,), values, True)
