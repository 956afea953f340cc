"""In which order texts come: batches of one data set at a time, the same in every process and after every restart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState

NO_ROW = -1  # stands in a sampler's order for no row: data sets give None there

Row = TypeVar("Row")


def present(rows: Sequence[Row | None]) -> list[Row]:
    """Those of a batch's rows that are rows; see `NO_ROW`."""
    return [row for row in rows if row is not None]


class EverySetOnce(torch.utils.data.Sampler[int]):
    """Numbers of rows in order, such that every batch, of all processes together, holds rows of one data set.

    Where rows do not fill a set's last batch `NO_ROW` follows: accelerate would fill it with rows that were there
    already, and torch would leave it out where ``dataloader_drop_last`` is set.

    Args:
        sizes: rows of each data set, which are numbered one set after the other.
        batch: rows of a batch of all processes.
    """

    def __init__(self, sizes: Sequence[int], batch: int) -> None:
        self._sizes, self._batch = list(sizes), batch

    def __len__(self) -> int:
        return sum(size + -size % self._batch for size in self._sizes)

    def __iter__(self) -> Iterator[int]:
        first = 0
        for size in self._sizes:
            yield from range(first, first + size)
            yield from repeat(NO_ROW, -size % self._batch)
            first += size


class EvenShares(BatchSampler):
    """The batches of a shard's sampler for all its processes in turn, the last of them empty where rows run out."""

    batch_size = None  # what accelerate takes for batches of any size, which it hands out as they are

    def __init__(self, shard: BatchSamplerShard) -> None:
        self._batches, self._processes = shard.batch_sampler, shard.num_processes

    def __len__(self) -> int:
        return len(self._batches) + self._spare

    def __iter__(self) -> Iterator[list[int]]:
        yield from self._batches
        yield from ([] for _ in range(self._spare))

    @property
    def _spare(self) -> int:
        return -len(self._batches) % self._processes


def without_repeats(loader: DataLoader) -> DataLoader:
    """A data loader of accelerate's, changed in place, that gives no row twice where rows do not fill the last batches.

    Of several processes the last ones then get fewer rows or none, in as many batches as the others.
    """
    shard = loader.batch_sampler
    if isinstance(shard, BatchSamplerShard) and shard.num_processes > 1 and not shard.drop_last:
        shard.batch_sampler, shard.batch_size = EvenShares(shard), None
    return loader


class OneSetAtATime(torch.utils.data.Sampler[int]):
    """Numbers of rows, such that every batch, of all ranks together, holds rows of one data set.

    Each epoch shuffles the rows of every set, cuts them into batches, and shuffles the batches of all sets. Rows that
    do not fill a batch are left out, other ones in every epoch; but a set that has fewer rows than a batch is left out
    in all of them: see `left_out`. The order follows from the seed and the epoch alone.

    Args:
        sizes: rows of each data set, which are numbered one set after the other.
        batch: rows of a batch of all ranks.
        seed: decides the order.

    Attributes:
        epoch: which epoch it is, from 0.
    """

    def __init__(self, sizes: Sequence[int], batch: int, seed: int) -> None:
        self._sizes, self._batch, self._seed, self.epoch = list(sizes), batch, seed, 0

    def __len__(self) -> int:
        return sum(size // self._batch for size in self._sizes) * self._batch

    @property
    def left_out(self) -> list[int]:
        """The sets, by their place in ``sizes``, that never fill a batch, and of which no row ever comes."""
        return [place for place, size in enumerate(self._sizes) if size < self._batch]

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self._seed, self.epoch])
        first, batches = 0, [np.empty((0, self._batch), np.int64)]
        for size in self._sizes:
            whole = size // self._batch
            rows = first + rng.permutation(size)[: whole * self._batch]
            batches.append(rows.reshape(whole, self._batch))
            first += size
        yield from rng.permutation(np.concatenate(batches)).flatten().tolist()


class DrawnAnew(torch.utils.data.Dataset):
    """A data set whose rows are drawn, others in every epoch.

    Attributes:
        epoch: which epoch it is, from 0. Workers of a data loader see it change, those too that stay for all epochs.
    """

    def __init__(self) -> None:
        self._epoch = torch.zeros((), dtype=torch.int64, device="cpu").share_memory_()

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)


class NextEpoch(TrainerCallback):
    """Tells samplers and data which epoch it is, by their attribute ``epoch``."""

    def __init__(self, *told: Any) -> None:
        self._told = told

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        for each in self._told:
            each.epoch = int(state.epoch or 0)
