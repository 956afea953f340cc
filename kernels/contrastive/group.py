"""The loss over a batch spread across the ranks of a process group, without gathering it.

Blocks of rows travel a ring: in each of as many steps as there are ranks, every rank works on one rank's rows, which it
then hands on. While it works, the next rows are already on their way. What is summed for the travelling rows (their
denominators, their gradients) travels with them, and is complete when they are home.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .passes import (
    Problem,
    Saved,
    Side,
    alignment,
    finish,
    largest,
    losses_of,
    own_similarity,
    problem_of,
    weighted,
    with_limits,
    zeros_for,
)
from .rule import LogSum, Rule, blocks


def ring_loss(
    queries: Tensor,
    documents: Tensor,
    scale: Tensor,
    positives: Tensor | None,
    ids: Tensor | None,
    rule: Rule,
    choice: str,
    group: dist.ProcessGroup,
    reduction: str,
) -> Tensor:
    """`contrastive_loss` over the ranks of ``group``; its checks are done.

    Raises:
        ValueError: rows of different width or dtype on different ranks.
    """
    ring = Ring(group, queries, documents, ids is not None)
    rule = replace(rule, bounded=False)  # ranks may differ in how they pass the scale
    losses = _RingLoss.apply(queries, documents, scale, positives, ids, rule, choice, ring)
    if reduction == "none":
        return losses
    local = losses.sum()
    total = local.detach().clone()
    dist.all_reduce(total, group=group)
    loss = total + (local - local.detach())  # the value that every rank has, with this rank's gradient
    return loss / sum(ring.query_counts) if reduction == "mean" else loss


class Ring:
    """Who holds how many rows, and the passing on of rows to the next rank."""

    def __init__(self, group: dist.ProcessGroup, queries: Tensor, documents: Tensor, has_ids: bool) -> None:
        self.group = group
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        here = (queries.shape[0], documents.shape[0], queries.shape[1], queries.dtype, has_ids)
        everywhere: list[Any] = [None] * self.size
        dist.all_gather_object(everywhere, here, group=group)
        if len({found[2:] for found in everywhere}) > 1:
            raise ValueError(
                f"ranks hold rows of width, dtype and with ids {[found[2:] for found in everywhere]}: they must agree"
            )
        self.query_counts = [found[0] for found in everywhere]
        self.document_counts = [found[1] for found in everywhere]

    def visits(self, side: Side, counts: list[int]) -> Iterator[tuple[int, Side]]:
        """Every rank's side in turn, this rank's own first: (that rank, its rows)."""
        for step in range(self.size):
            owner = (self.rank - step) % self.size
            pending = None if step + 1 == self.size else self._pass_on(side.tensors(), counts, owner)
            yield owner, side
            if pending is not None:
                # Whether marks count up is known of this rank's own only.
                side = replace(side, first=None, **pending.wait())

    def hand_on(self, x: Tensor, counts: list[int], owner: int) -> Tensor:
        """Give away what travels with ``owner``'s rows, and get what travels with those that come next."""
        return x if self.size == 1 else self._pass_on({"x": x}, counts, owner).wait()["x"]

    def _pass_on(self, tensors: dict[str, Tensor | None], counts: list[int], owner: int) -> _Passing:
        after, before = (dist.get_global_rank(self.group, (self.rank + step) % self.size) for step in (1, -1))
        incoming = counts[(owner - 1) % self.size]
        received: dict[str, Tensor | None] = dict.fromkeys(tensors)
        operations, kept = [], []
        for name, x in tensors.items():
            if x is None:
                continue
            received[name] = x.new_empty((incoming, *x.shape[1:]))
            # As bytes: not every transport knows bfloat16.
            out, into = (y.contiguous().view(-1).view(torch.uint8) for y in (x, received[name]))
            kept.append(out)
            if out.numel():
                operations.append(dist.P2POp(dist.isend, out, after, self.group))
            if into.numel():
                operations.append(dist.P2POp(dist.irecv, into, before, self.group))
        return _Passing(received, dist.batch_isend_irecv(operations) if operations else [], kept)


class _Passing:
    """Rows on their way; what is sent is held until it has left."""

    def __init__(self, received: dict[str, Tensor | None], works: list[dist.Work], sent: list[Tensor]) -> None:
        self._received, self._works, self._sent = received, works, sent

    def wait(self) -> dict[str, Tensor | None]:
        for work in self._works:
            work.wait()
        return self._received


class _RingLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        documents: Tensor,
        scale: Tensor,
        positives: Tensor | None,
        ids: Tensor | None,
        rule: Rule,
        backend: str,
        ring: Ring,
    ) -> Tensor:
        with torch.autocast(queries.device.type, enabled=False):
            problem = _numbered(queries, documents, scale, positives, ids, rule, backend, ring)
            saved = _forward(problem, ring)
        ctx.save_for_backward(*saved, queries, documents, scale, positives, ids)
        ctx.settings = (rule, backend, ring)
        return losses_of(problem, saved)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        own, sums, column_sums, *inputs = ctx.saved_tensors
        problem = _numbered(*inputs, *ctx.settings)
        gradients = _backward(problem, Saved(own, sums, column_sums), grad, ctx.settings[2], inputs[0].dtype)
        wanted = zip(gradients, ctx.needs_input_grad[:3], strict=True)
        return *(x if need else None for x, need in wanted), None, None, None, None, None


def _numbered(
    queries: Tensor,
    documents: Tensor,
    scale: Tensor,
    positives: Tensor | None,
    ids: Tensor | None,
    rule: Rule,
    backend: str,
    ring: Ring,
) -> Problem:
    """The problem of this rank, whose documents are numbered across ranks."""
    first = sum(ring.document_counts[: ring.rank])
    return problem_of(queries, documents, scale, positives, ids, rule, backend, first)


def _forward(problem: Problem, ring: Ring) -> Saved:
    own = own_similarity(problem)
    problem = with_limits(problem, own)
    rule, queries, room = problem.rule, problem.queries, problem.room
    sums = LogSum.empty(own, queries.count)
    column_sums = torch.stack(
        LogSum.empty(own, problem.documents.count), dim=1
    )  # one row a document, as all that travels
    for owner, side in ring.visits(problem.documents, ring.document_counts):
        if side.count:
            more, columns = room.negative_sums(queries, side, problem.scale, rule.symmetric, rule.bounded)
            sums = sums.plus(more)
            if columns is not None:
                column_sums = torch.stack(LogSum(*column_sums.T).plus(columns), dim=1)
        if rule.symmetric:
            column_sums = ring.hand_on(column_sums, ring.document_counts, owner)
    if rule.query_negatives:
        for _, side in ring.visits(queries, ring.query_counts):
            sums = sums.plus(room.negative_sums(queries, side, problem.scale, False, rule.bounded)[0])
    return Saved(own, torch.stack(sums), column_sums.T)


def _backward(
    problem: Problem, saved: Saved, grad: Tensor, ring: Ring, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    peak = largest(grad)
    dist.all_reduce(peak, dist.ReduceOp.MAX, group=ring.group)
    made = weighted(problem, saved, grad, peak)
    problem = made.problem
    queries, documents = problem.queries, problem.documents
    into, into_documents = zeros_for(queries), zeros_for(documents)
    for owner, side in ring.visits(documents, ring.document_counts):
        own = (problem.positives, made.positive_gradient) if owner == ring.rank else None
        _add(problem, side, own, into, into_documents)
        into_documents = ring.hand_on(into_documents, ring.document_counts, owner)
    slope = alignment(queries, into)
    if problem.rule.query_negatives:
        for _, side in ring.visits(queries, ring.query_counts):
            _add(problem, side, None, into, None)
    slope = (slope + alignment(queries, into)) / 2 * peak
    factor = problem.scale * peak
    return finish(queries, into, factor, None, dtype), finish(documents, into_documents, factor, None, dtype), slope


def _add(
    problem: Problem, side: Side, positives: tuple[Tensor, Tensor] | None, into: Tensor, into_side: Tensor | None
) -> None:
    for panel in blocks(problem.queries.count if side.count else 0, problem.room.PANEL_ROWS):
        own = None if positives is None else (positives[0][panel], positives[1][panel])
        problem.room.add_gradients(problem.queries.part(panel), side, problem.scale, own, into[panel], into_side)
