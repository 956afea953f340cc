"""Every epoch draws anew, whichever process makes the batches; and sets too small for a batch are told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from torch.utils.data import DataLoader

from llm2vec_fast.training.arguments import ContrastiveArguments
from llm2vec_fast.training.mntp import Sequences
from llm2vec_fast.training.pairs import Pairs
from llm2vec_fast.training.sampling import NextEpoch, OneSetAtATime

Settings = Callable[..., dict[str, object]]


class Epoch:
    """What a trainer's state says of the epoch."""

    def __init__(self, epoch: float) -> None:
        self.epoch = epoch


def as_it_is(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return rows


def sequences(settings: Settings, folder: Path) -> Sequences:
    rows = {"input_ids": [[i, 2, 3] for i in range(12)], "special": [[0, 0, 0]] * 12}
    return Sequences(datasets.Dataset.from_dict(rows), seed=4)


def pairs(settings: Settings, folder: Path) -> Pairs:
    path = folder / "rows.jsonl"
    rows = [{"query": f"q {i}", "positive": [f"d {i} {j}" for j in range(8)]} for i in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Pairs([str(path)], ContrastiveArguments(**settings(train_file=[str(path)])))


@pytest.mark.parametrize("make", [sequences, pairs])
def test_workers_that_stay_draw_anew_in_every_epoch(
    make: Callable[[Settings, Path], Any], settings: Settings, tmp_path: Path
) -> None:
    data = make(settings, tmp_path)
    loader = DataLoader(data, batch_size=4, num_workers=2, persistent_workers=True, collate_fn=as_it_is)
    drawn = []
    for epoch in (0, 1, 2, 0):
        NextEpoch(data).on_epoch_begin(None, Epoch(float(epoch)), None)
        assert data.epoch == epoch
        here = [data[i] for i in range(len(data))]
        assert [row for batch in loader for row in batch] == here
        drawn.append(here)
    assert drawn[0] == drawn[3]
    assert drawn[0] != drawn[1] != drawn[2] != drawn[0]


def test_sets_that_never_fill_a_batch_are_told() -> None:
    assert OneSetAtATime([64, 7, 8, 0], batch=8, seed=0).left_out == [1, 3]
    assert OneSetAtATime([64, 8], batch=8, seed=0).left_out == []
