"""How rows of a batch that is spread across ranks meet: round a ring, or all at once where they are few.

Every rank needs every rank's rows, and what it sums for them (their denominators, their gradients) has to get home.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .rule import Side

# What a rank may hold of all ranks' documents at once: rows, the sums of their gradients, and those that others send.
# 8 ranks of 2,048 rows of 1,024 bfloat16 need 160 MiB. A step of the ring would then multiply 9 GFLOP, which takes a
# GPU no longer than a transfer takes to start; with more rows transfers hide behind products, and memory counts.
GATHERED_BYTES = 256 * 2**20

Joined = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Ranks(ABC):
    """The ranks of a group, and how many queries and documents each of them holds."""

    group: dist.ProcessGroup
    query_counts: list[int]
    document_counts: list[int]
    known: int = 0  # ids known to suit a query, on the rank with the most

    @property
    def size(self) -> int:
        """Ranks."""
        return len(self.query_counts)

    @property
    def rank(self) -> int:
        """This one."""
        return dist.get_rank(self.group)

    @abstractmethod
    def first_visit(self, counts: list[int]) -> tuple[int, int]:
        """How many rows come first, and where this rank's own begin among them."""

    @abstractmethod
    def visits(self, side: Side, counts: list[int]) -> Iterator[tuple[int, Side]]:
        """The rows of all ranks, in parts: (their owner, they); those with this rank's own come first, as its own."""

    @abstractmethod
    def hand_on(self, x: Tensor, counts: list[int], owner: int, joined: Joined) -> Tensor:
        """Give away what was summed for the rows of a visit, and get what was summed for those of the next one.

        After the last visit that is what all ranks have summed for this rank's rows; ``joined`` makes (n, …) of
        (parts, n, …).
        """

    def exchange(self, outgoing: list[tuple[int, Tensor]], incoming: list[tuple[int, Tensor]]) -> Transfer:
        """Begin to send a tensor to each of these ranks, and to receive one from each of those."""
        # As bytes: not every transport knows bfloat16.
        sent = [(rank, x.contiguous().view(-1).view(torch.uint8)) for rank, x in outgoing if x.numel()]
        received = [(rank, x.view(-1).view(torch.uint8)) for rank, x in incoming if x.numel()]
        operations = [
            dist.P2POp(operation, x, dist.get_global_rank(self.group, rank), self.group)
            for operation, pairs in ((dist.isend, sent), (dist.irecv, received))
            for rank, x in pairs
        ]
        return Transfer(dist.batch_isend_irecv(operations) if operations else [], sent)


@dataclass(frozen=True)
class Transfer:
    """Rows on their way; what is sent is held until it has left."""

    works: list[dist.Work]
    sent: list[tuple[int, Tensor]]

    def wait(self) -> None:
        """Until all has arrived."""
        for work in self.works:
            work.wait()


class Ring(Ranks):
    """In each of as many steps as there are ranks, a rank works on one rank's rows, which it then hands on.

    While it works, the next rows are already on their way. What is summed for the rows travels behind them.
    """

    def first_visit(self, counts: list[int]) -> tuple[int, int]:
        return counts[self.rank], 0

    def visits(self, side: Side, counts: list[int]) -> Iterator[tuple[int, Side]]:
        for step in range(self.size):
            owner = (self.rank - step) % self.size
            if step + 1 == self.size:
                yield owner, side
                return
            following, transfer = self._pass_on(side.tensors(), counts, owner)
            yield owner, side
            transfer.wait()
            # Whether marks count up is known of this rank's own only.
            side = replace(side, first=None, **following)

    def hand_on(self, x: Tensor, counts: list[int], owner: int, joined: Joined) -> Tensor:
        if self.size == 1:
            return x
        following, transfer = self._pass_on({"x": x}, counts, owner)
        transfer.wait()
        return following["x"]

    def _pass_on(
        self, tensors: dict[str, Tensor | None], counts: list[int], owner: int
    ) -> tuple[dict[str, Tensor | None], Transfer]:
        """Tensors that will hold what the rank before sends, by name, and the transfer that fills them."""
        count = counts[(owner - 1) % self.size]
        following = {name: None if x is None else x.new_empty((count, *x.shape[1:])) for name, x in tensors.items()}
        outgoing, incoming = (
            [((self.rank + step) % self.size, x) for x in given.values() if x is not None]
            for step, given in ((1, tensors), (-1, following))
        )
        return following, self.exchange(outgoing, incoming)


class Gathering(Ranks):
    """Every rank gets all rows in one exchange, works on them at once, and sends what it has summed to their owners."""

    def first_visit(self, counts: list[int]) -> tuple[int, int]:
        return sum(counts), sum(counts[: self.rank])

    def visits(self, side: Side, counts: list[int]) -> Iterator[tuple[int, Side]]:
        held = {name: x for name, x in side.tensors().items() if x is not None}
        gathered = {name: x.new_empty((sum(counts), *x.shape[1:])) for name, x in held.items()}
        parts = {name: x.split(counts) for name, x in gathered.items()}
        for name, x in held.items():
            parts[name][self.rank].copy_(x)
        self.exchange(
            [(rank, x) for rank in self._others() for x in held.values()],
            [(rank, part[rank]) for rank in self._others() for part in parts.values()],
        ).wait()
        yield self.rank, replace(side, first=None, **gathered)

    def hand_on(self, x: Tensor, counts: list[int], owner: int, joined: Joined) -> Tensor:
        shares, found = x.split(counts), x.new_empty((self.size, counts[self.rank], *x.shape[1:]))
        found[self.rank] = shares[self.rank]
        self.exchange(
            [(rank, shares[rank]) for rank in self._others()], [(rank, found[rank]) for rank in self._others()]
        ).wait()
        return joined(found)

    def _others(self) -> list[int]:
        return [rank for rank in range(self.size) if rank != self.rank]


def ranks_of(
    group: dist.ProcessGroup,
    queries: Tensor,
    documents: Tensor,
    ids: Tensor | None = None,
    known: Tensor | None = None,
    guide: tuple[Tensor, Tensor] | None = None,
) -> Ranks:
    """Who holds how many rows, and how they are to meet.

    Raises:
        ValueError: rows of different width or dtype on different ranks, guides of different width, or either or ids on
            some only.
    """
    counts = (queries.shape[0], documents.shape[0], 0 if known is None else known.shape[1])
    here = (*counts, queries.shape[1], queries.dtype, ids is not None, guide and guide[0].shape[1])
    everywhere: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everywhere, here, group=group)
    if len({found[3:] for found in everywhere}) > 1:
        raise ValueError(
            "ranks hold rows of width, dtype, with ids, and a guide of width "
            f"{[found[3:] for found in everywhere]}: they must agree"
        )
    query_counts, document_counts, known_counts = ([found[i] for found in everywhere] for i in range(3))
    accumulator = torch.promote_types(queries.dtype, torch.float32)
    rows = len(everywhere) * max(*query_counts, *document_counts)  # as many as any rank may be sent sums of
    needed = rows * queries.shape[1] * (queries.dtype.itemsize + 2 * accumulator.itemsize)
    needed += 0 if guide is None else rows * guide[0].shape[1] * accumulator.itemsize
    return (Gathering if needed <= GATHERED_BYTES else Ring)(group, query_counts, document_counts, max(known_counts))
