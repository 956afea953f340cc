"""Runs of every stage under drawn settings are what stock transformers, peft and PyTorch make of the same texts.

A case is a combination of settings (`training_cases.AXES`): stage, family, adapter, checkpointing, pieces, optimiser
and more. The stage trains two or three updates; the same texts, tokenised by a stock call, go through the
stock model one by one (`stock_training`). Compared are the loss, the gradient of each parameter and the weights of each
update, then what was written: its weights in stock peft, and the vectors that `LLM2Vec` makes of it. Of the run itself
only three things are taken over: which rows form a batch, which tokens are hidden, and the new adapter's first weights.

By default the cases are a plan in which any two values of different settings meet. ``LIKE_STOCK_CASES=500`` draws as
many at random, with seeds from ``LIKE_STOCK_FIRST`` (0) on; one that fails is repeated by its name, or by its seed:
``LIKE_STOCK_FIRST=123 LIKE_STOCK_CASES=1``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import recorded_training
import torch
from recorded_training import Record, recorded
from stock_stages import STOCK, StockStage, WordLevel
from stock_training import Recipe, StockOptimiser, Update, load_stock
from torch import Tensor
from training_cases import (
    FAMILIES,
    STAGES,
    Case,
    Materials,
    drawn,
    name_of,
    options_of,
    planned,
    sentences_of,
    texts_of,
)
from warm_processes import Ranks, WarmProcesses

from llm2vec_fast import LLM2Vec
from llm2vec_fast.training.word_level import WordClassifier

_COUNT, _FIRST = (int(os.environ.get(f"LIKE_STOCK_{name}", "0")) for name in ("CASES", "FIRST"))
_SEEDS = range(_FIRST, _FIRST + _COUNT)
CASES = [drawn(seed) for seed in _SEEDS] if _COUNT else planned()
TWO_PROCESSES = [
    drawn(seed, stage=STAGES[seed % 6], family=tuple(FAMILIES)[seed % 6], processes=2) for seed in _SEEDS or range(6)
]
# Where float32 rounds to in two ways of computing one thing; a wrong factor, mask or seed is off by 1e-2 and more.
TOLERANCE = 1e-4

Weights = Mapping[str, Tensor]


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_run_is_the_stock_run(case: Case, materials: Materials, tmp_path: Path) -> None:
    stage, options = options_of(case, materials, tmp_path)
    check(case, options, [recorded(stage, options, case["interrupted"])], materials)


@pytest.mark.parametrize("case", TWO_PROCESSES, ids=name_of)
def test_a_run_of_two_processes_is_the_stock_run(
    case: Case, materials: Materials, warm: WarmProcesses, finished: Callable[[Ranks], str], tmp_path: Path
) -> None:
    """Each has half of a batch; the last rows may be too few for both."""
    stage, options = options_of(case, materials, tmp_path)
    options["use_cpu"] = torch.accelerator.is_available()  # on a machine without one nobody has to say so
    (tmp_path / "options.json").write_text(json.dumps(options))
    program = [recorded_training.__file__, stage, str(tmp_path / "options.json"), str(tmp_path / "record")]
    finished(warm.start(program, 2, tmp_path))
    records = [Record(**torch.load(tmp_path / f"record-{rank}.pt", weights_only=True)) for rank in range(2)]
    check(case, options, records, materials)


def check(case: Case, options: Mapping[str, Any], records: Sequence[Record], materials: Materials) -> None:
    """The records of all processes against the stock run, and the folder that was written."""
    record = records[0]
    assert len(record.losses) == len(record.weights) == len(record.batches) >= 1
    for other in records[1:]:
        for ours, others in zip(record.weights, other.weights, strict=True):
            assert all(torch.equal(x, others[name]) for name, x in ours.items()), "processes train apart"
    stock = STOCK[case["stage"]](case, options, record.before, materials)
    optimiser = StockOptimiser(stock.parameters, _recipe(options), len(record.losses))
    windows = [with_rows(batch for rank in records for batch in rank.batches[i]) for i in range(len(record.losses))]
    start, updates = {name: x.detach().clone() for name, x in stock.parameters.items()}, []
    for i, window in enumerate(windows):
        expected = optimiser.update(stock.loss(window))
        updates.append(expected)
        found = Update(record.losses[i], record.norms[i], record.gradients[i], record.weights[i])
        assert_same_update(found, expected, start, f"update {i + 1}")
        start = found.weights
        for name, x in stock.parameters.items():
            x.data.copy_(start[name])  # else what rounding does to one update would grow in the next ones
        if record.validation:
            batches = [with_rows(ranks) for ranks in zip(*(x.validation[i] for x in records), strict=True)]
            with torch.no_grad():
                assert record.evaluated[i] == pytest.approx(float(stock.evaluated(batches)), rel=TOLERANCE)
    assert any(x.norm for x in updates)  # a case of no gradient shows nothing
    if options["load_best_model_at_end"]:
        assert len(record.evaluated) == len(updates)
        best = updates[record.evaluated.index(max(record.evaluated))]
        for name, x in stock.parameters.items():
            x.data.copy_(best.weights[name])
    check_output = check_head if isinstance(stock, WordLevel) else check_encoder
    check_output(stock, Path(options["output_dir"]))


def with_rows(batches: Iterable[Mapping[str, Tensor]]) -> list[Mapping[str, Tensor]]:
    return [batch for batch in batches if len(batch["rows"])]


def assert_same_update(found: Update, expected: Update, start: Weights, place: str) -> None:
    """Loss, norm of the gradients, each gradient, and how far each weight has gone from where it started."""
    assert found.loss == pytest.approx(expected.loss, rel=TOLERANCE), place
    assert found.norm == pytest.approx(expected.norm, rel=TOLERANCE), place
    assert_close(found.gradients, expected.gradients, f"gradient of {place}")
    assert_close(found.weights, expected.weights, f"weights of {place}", start)


def assert_close(found: Weights, expected: Weights, what: str, start: Weights | None = None) -> None:
    """Each within the tolerance of its own norm; where that is small, of a hundredth of the norm of all of them.

    With ``start`` it is the norm of the difference to that, and what rounds away in adding to it is allowed.
    """
    assert found.keys() == expected.keys()
    moved = {name: x - start[name] if start else x for name, x in expected.items()}
    total = float(torch.stack([x.norm() for x in moved.values()]).norm())
    for name, x in moved.items():
        apart, size = float((found[name] - expected[name]).norm()), max(float(x.norm()), total / 100)
        rounded = torch.finfo(torch.float32).eps * float(expected[name].norm()) if start else 0.0
        assert apart <= TOLERANCE * size + rounded, f"{what}: {name} is off by {apart:.1e} where its norm is {size:.1e}"


def _recipe(options: Mapping[str, Any]) -> Recipe:
    return Recipe(**{name: options[name] for name in Recipe.__dataclass_fields__})


def check_encoder(stock: StockStage, folder: Path) -> None:
    """Weights as stock peft reads them, and vectors."""
    expected, is_adapter = stock.trained()
    base = stock.materials.decoder(stock.case["family"])
    written = load_stock(base, [folder]) if is_adapter else load_stock(folder)
    assert_close(written.state_dict(), expected.state_dict(), "what was written", load_stock(base).state_dict())
    texts = texts_of(stock.case)[:4]
    encoder = LLM2Vec.from_pretrained(folder, dtype="float32", device="cpu")  # an adapter names its base
    with torch.no_grad():
        rows = stock.vectors(expected, [stock.ids_of(text, limit=512) for text in texts])
    assert_close({"vectors": encoder.encode(texts)}, {"vectors": rows}, "the encoder")


def check_head(stock: WordLevel, folder: Path) -> None:
    """The label of every word."""
    classifier = WordClassifier.from_pretrained(folder, dtype="float32", device="cpu")
    found = classifier.predict([words for words, _ in sentences_of(stock.case)])
    assert [label for sentence in found for label in sentence] == stock.labels()
