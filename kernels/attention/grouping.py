"""Which sequences of a batch run as one batched matrix product, and how their rows get there and back.

Sequences of equal length share a call, so that a forward pass over short texts makes a handful of calls a layer instead
of one a text; no more of them than a step's scores fit the cache. A group is laid out heads first: row block (h, n) of
(kv_heads · count) holds sequence n of key head h.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..once import once_a_layout

# A query block of one sequence is this long; its scores are what a step holds.
QUERY_BLOCK = 256
# A group's half a dozen steps cost more than that many calls of a kernel.
LEAST_TOGETHER = 3
# Without gradients, sequences of up to PADDED_LENGTH tokens are padded to a multiple of the first, longer ones of the
# second. Besides fewer and more even products that is fewer shapes, and oneDNN keeps half a MiB of generated code for
# every shape it has met.
LENGTH_STEP = 16
LONG_LENGTH_STEP = 64
# With gradients, sequences share a padded call while padding stays below this part of it, up to this length.
PADDING_SHARE = 0.15
PADDED_LENGTH = 512


@dataclass(frozen=True)
class Group:
    """Sequences that run as one (count, length) batch.

    Attributes:
        count, length: sequences, and tokens of the longest.
        rows: rows of the flat batch, one after the other or (count · length,) int64, where padding repeats a
            sequence's last token.
        places: (kv_heads · count · length,) int64, where a tensor seen as (T · kv_heads, width) holds those rows, heads
            first; None where ``rows`` is a slice.
        real: (tokens,) int64, which of count · length are tokens, and their rows; None: all of them.
        padding: (count, length) bool, True on padding; None: there is none.
        unpadded: keys that are tokens in every sequence.
        sequences: (count,) int64, their numbers in the layout.
    """

    count: int
    length: int
    rows: slice | Tensor
    places: Tensor | None
    real: tuple[Tensor, Tensor] | None
    padding: Tensor | None
    unpadded: int
    sequences: Tensor

    def take(self, x: Tensor) -> Tensor:
        """(T, kv_heads, width) contiguous → (kv_heads, count · length, width)."""
        if self.places is None:
            return x[self.rows].transpose(0, 1)
        return x.flatten(0, 1).index_select(0, self.places).view(x.shape[1], -1, x.shape[2])

    def put(self, part: Tensor, out: Tensor) -> None:
        """(kv_heads, count · length, width) → its rows of out (T, kv_heads, width); padding is left out."""
        part = part.transpose(0, 1)
        if isinstance(self.rows, slice):
            out[self.rows] = part
        elif self.real is None:
            out.index_copy_(0, self.rows, part)
        else:
            real, rows = self.real
            out.index_copy_(0, rows, part.index_select(0, real))


@dataclass(frozen=True)
class Run:
    """``count`` sequences of ``length`` tokens that follow one another from row ``start`` on."""

    count: int
    length: int
    start: int

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + self.count * self.length)


@dataclass(frozen=True)
class Plan:
    """How a batch is computed.

    Attributes:
        runs: what a kernel that reads rows in place takes.
        groups: the rest.
        full: every row of the batch belongs to a sequence.
    """

    runs: tuple[Run, ...]
    groups: tuple[Group, ...]
    full: bool

    @property
    def is_one_run(self) -> bool:
        """One run is the whole batch."""
        return self.full and len(self.runs) == 1 and not self.groups


@once_a_layout
def plan(
    starts: Tensor,
    lengths: Tensor,
    rows: int,
    training: bool,
    heads: int,
    kv_heads: int,
    budget: int,
    runs: range,
) -> Plan:
    """The plan of a batch of ``rows`` rows, longest sequences first; empty ones are left out.

    Args:
        starts, lengths: of the batch's layout.
        training: sequences of near-equal length share a group too. Without, a sequence is padded as
            `padded_length` says: how it is computed depends on its length alone.
        heads, kv_heads: of the tensors that the groups are for.
        budget: scores that one step over a group may hold, unless one sequence alone has more.
        runs: lengths whose sequences become runs. In training so do shorter ones with too few others alike to make a
            group worth its steps.
    """
    host_starts, host = starts.tolist(), lengths.tolist()
    found_runs = _runs(host_starts, host, [i for i, length in enumerate(host) if length in runs])
    found: list[Group] = []
    for members in _alike([0 if length in runs else length for length in host], training):
        if training and len(members) < LEAST_TOGETHER and all(host[i] < runs.stop for i in members):
            found_runs += _runs(host_starts, host, members)
            continue
        longest = max(host[i] for i in members)
        longest = longest if training else padded_length(longest)
        size = max(1, budget // (heads * min(longest, QUERY_BLOCK) * longest))
        parts = [members[i : i + size] for i in range(0, len(members), size)]
        found += [_make(starts, lengths, part, kv_heads, training) for part in parts]
    return Plan(tuple(found_runs), tuple(found), sum(host) == rows)


def padded_length(length: int) -> int:
    """What a sequence is padded to without gradients."""
    step = LENGTH_STEP if length <= PADDED_LENGTH else LONG_LENGTH_STEP
    return -(-length // step) * step


def _runs(starts: list[int], lengths: list[int], members: list[int]) -> list[Run]:
    runs: list[Run] = []
    for i in members:
        last = runs[-1] if runs else None
        if last is not None and lengths[i] == last.length and starts[i] == last.rows.stop:
            runs[-1] = replace(last, count=last.count + 1)
        else:
            runs.append(Run(1, lengths[i], starts[i]))
    return runs


def _alike(lengths: list[int], training: bool) -> list[list[int]]:
    """Sequence numbers in order, longest sequences first, those that may share a call together; no empty ones."""
    alike: list[list[int]] = []
    tokens = 0
    for i in sorted((i for i, length in enumerate(lengths) if length), key=lambda i: (-lengths[i], i)):
        longest = lengths[alike[-1][0]] if alike else 0
        if training:
            rows = (len(alike[-1]) + 1) * longest if alike else 0
            few = longest <= PADDED_LENGTH and rows - tokens - lengths[i] <= PADDING_SHARE * rows
            shares = lengths[i] == longest or few
        else:
            shares = padded_length(lengths[i]) == padded_length(longest)
        if alike and shares:
            alike[-1].append(i)
            tokens += lengths[i]
        else:
            alike.append([i])
            tokens = lengths[i]
    return [sorted(members) for members in alike]


def _make(starts: Tensor, lengths: Tensor, members: list[int], kv_heads: int, training: bool) -> Group:
    device = starts.device
    with torch.device("cpu"):
        sequences = torch.tensor(members)
        starts, lengths = starts.cpu().long()[sequences], lengths.cpu().long()[sequences]
        count, shortest, longest, first = len(members), int(lengths.min()), int(lengths.max()), int(starts[0])
        longest = longest if training else padded_length(longest)
        if shortest == longest and torch.equal(starts, first + torch.arange(count) * longest):
            rows = slice(first, first + count * longest)
            return Group(count, longest, rows, None, None, None, longest, sequences.to(device))
        positions = torch.arange(longest)
        padding = positions >= lengths[:, None]
        rows = (starts[:, None] + positions.minimum(lengths[:, None] - 1)).flatten()
        places = (rows * kv_heads + torch.arange(kv_heads)[:, None]).flatten()
        real = (~padding).flatten().nonzero().flatten()
    if shortest == longest:
        return Group(count, longest, rows.to(device), places.to(device), None, None, longest, sequences.to(device))
    real_rows, rows, places, real, padding = (x.to(device) for x in (rows[real], rows, places, real, padding))
    return Group(count, longest, rows, places, (real, real_rows), padding, shortest, sequences.to(device))
