"""The loss over a batch spread across the ranks of a process group.

Every rank works on its own queries and all documents, which visit it as `ranks` sees fit. What it sums for them (their
denominators, their gradients) goes home to their rank.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .passes import (
    Problem,
    Saved,
    add_at,
    alignment,
    finish,
    largest,
    losses_of,
    own_similarity,
    problem_of,
    saved_of,
    weighted,
    with_limits,
    zeros_for,
)
from .ranks import Ranks, ranks_of
from .rule import NO_ID, LogSum, Rule, Side, blocks


def group_loss(
    queries: Tensor,
    documents: Tensor,
    scale: Tensor,
    positives: Tensor | None,
    ids: Tensor | None,
    known: Tensor | None,
    guide: tuple[Tensor, Tensor] | None,
    rule: Rule,
    choice: str,
    group: dist.ProcessGroup,
    reduction: str,
) -> Tensor:
    """`contrastive_loss` over the ranks of ``group``; its checks are done.

    Raises:
        ValueError: rows of different width or dtype on different ranks.
    """
    ranks = ranks_of(group, queries, documents, ids, known, guide)
    if ids is not None:  # what travels has the same shape and dtype everywhere
        known = documents.new_empty((queries.shape[0], 0)) if known is None else known
        ids, known = ids.long(), F.pad(known.long(), (0, ranks.known - known.shape[1]), value=NO_ID)
    rule = replace(rule, bounded=False)  # ranks may differ in how they pass the scale
    losses = _GroupLoss.apply(
        queries, documents, scale, positives, ids, known, *(guide or (None, None)), rule, choice, ranks
    )
    if reduction == "none":
        return losses
    local = losses.sum()
    total = local.detach().clone()
    dist.all_reduce(total, group=group)
    loss = total + (local - local.detach())  # the value that every rank has, with this rank's gradient
    return loss / sum(ranks.query_counts) if reduction == "mean" else loss


class _GroupLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        documents: Tensor,
        scale: Tensor,
        positives: Tensor | None,
        ids: Tensor | None,
        known: Tensor | None,
        guide_queries: Tensor | None,
        guide_documents: Tensor | None,
        rule: Rule,
        backend: str,
        ranks: Ranks,
    ) -> Tensor:
        with torch.autocast(queries.device.type, enabled=False):
            inputs = (queries, documents, scale, positives, ids, known, guide_queries, guide_documents)
            problem = _numbered(*inputs, rule, backend, ranks)
            saved = _forward(problem, ranks)
        ctx.save_for_backward(*saved, *inputs)
        ctx.settings = (rule, backend, ranks)
        return losses_of(problem, saved)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        own, sums, column_sums, *inputs = ctx.saved_tensors
        problem = _numbered(*inputs, *ctx.settings)
        gradients = _backward(problem, Saved(own, sums, column_sums), grad, ctx.settings[2], inputs[0].dtype)
        wanted = zip(gradients, ctx.needs_input_grad[:3], strict=True)
        return *(x if need else None for x, need in wanted), *(None,) * 8


def _numbered(
    queries: Tensor,
    documents: Tensor,
    scale: Tensor,
    positives: Tensor | None,
    ids: Tensor | None,
    known: Tensor | None,
    guide_queries: Tensor | None,
    guide_documents: Tensor | None,
    rule: Rule,
    backend: str,
    ranks: Ranks,
) -> Problem:
    """The problem of this rank, whose documents are numbered across ranks."""
    first = sum(ranks.document_counts[: ranks.rank])
    guide = None if guide_queries is None else (guide_queries, guide_documents)
    return problem_of(queries, documents, scale, positives, ids, known, guide, rule, backend, first)


def _forward(problem: Problem, ranks: Ranks) -> Saved:
    own = own_similarity(problem)
    problem = with_limits(problem, own)
    rule, queries, room = problem.rule, problem.queries, problem.room
    counts = ranks.document_counts
    sums = LogSum.empty(own, queries.count)
    # One row a document, as all that travels.
    column_sums = torch.stack(LogSum.empty(own, ranks.first_visit(counts)[0]), dim=1)
    for owner, side in ranks.visits(problem.documents, counts):
        if side.count:
            more, columns = room.negative_sums(queries, side, problem.scale, rule.columns, rule.bounded)
            sums = sums.plus(more)
            if columns is not None:
                column_sums = torch.stack(LogSum(*column_sums.T).plus(columns), dim=1)
        if rule.columns:
            column_sums = ranks.hand_on(column_sums, counts, owner, _joined)
    for own_side in problem.alike():
        for _, side in ranks.visits(own_side, ranks.query_counts):
            sums = sums.plus(room.negative_sums(own_side, side, problem.scale, False, rule.bounded)[0])
    return saved_of(problem, own, sums, column_sums.T)


def _joined(parts: Tensor) -> Tensor:
    """(n, 2) logarithms of sums over parts (parts, n, 2)."""
    return torch.stack(LogSum.joined(*parts.unbind(-1)), dim=1)


def _backward(
    problem: Problem, saved: Saved, grad: Tensor, ranks: Ranks, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    peak = largest(grad)
    dist.all_reduce(peak, dist.ReduceOp.MAX, group=ranks.group)
    made = weighted(problem, saved, grad, peak)
    problem = made.problem
    queries, documents = problem.queries, problem.documents
    counts = ranks.document_counts
    rows, first = ranks.first_visit(counts)
    into, into_documents = zeros_for(queries), zeros_for(documents, rows)
    for owner, side in ranks.visits(documents, counts):
        own = (first + problem.positives, made.positive_gradient) if owner == ranks.rank else None
        _add(problem, side, own, into, into_documents)
        into_documents = ranks.hand_on(into_documents, counts, owner, lambda parts: parts.sum(0))
    slope = alignment(queries, into)
    if problem.rule.query_negatives:
        for _, side in ranks.visits(queries, ranks.query_counts):
            _add(problem, side, None, into, None)
    slope = slope + alignment(queries, into)
    if problem.rule.document_negatives:
        own_side = problem.alike()[-1]
        into_own = zeros_for(own_side)
        for _, side in ranks.visits(own_side, ranks.query_counts):
            _add(replace(problem, queries=own_side), side, None, into_own, None)
        slope = slope + alignment(own_side, into_own)
        add_at(into_documents, problem.positives, into_own)
    slope = slope / 2 * peak
    factor = problem.scale * peak
    return finish(queries, into, factor, None, dtype), finish(documents, into_documents, factor, None, dtype), slope


def _add(
    problem: Problem, side: Side, positives: tuple[Tensor, Tensor] | None, into: Tensor, into_side: Tensor | None
) -> None:
    for panel in blocks(problem.queries.count if side.count else 0, problem.room.PANEL_ROWS):
        own = None if positives is None else (positives[0][panel], positives[1][panel])
        problem.room.add_gradients(problem.queries.part(panel), side, problem.scale, own, into[panel], into_side)
