"""Scores: what is chosen is chosen on the sets that are there for it, and what is kept is of the adapter at hand."""

from pathlib import Path

import pytest

from benchmarks.reproduce import measure
from benchmarks.reproduce.measure import Encoder, sts_scores, word_scores
from llm2vec_fast.loading import ADAPTER_WEIGHTS

# The other one is better on the test set.
STS = {("mean", "dev"): 60.0, ("mean", "test"): 50.0, ("weighted_mean", "dev"): 55.0, ("weighted_mean", "test"): 70.0}
WORDS = {"same_token": {"valid": 80.0, "test": 70.0}, "next_token": {"valid": 70.0, "test": 90.0}}


def test_choices_are_made_without_the_test_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_sts", lambda encoder, folder, pooling, split: STS[pooling, split])
    monkeypatch.setattr(measure, "_words", lambda encoder, folder, task, label_from: WORDS[label_from])
    encoder = Encoder("any", "Any", poolings=("mean", "weighted_mean"))
    scores = sts_scores(encoder, tmp_path)
    assert (scores["pooling"], scores["test"]) == ("mean", 50.0)
    for task in word_scores(encoder, tmp_path).keys() & measure.TASKS.keys():
        found = word_scores(encoder, tmp_path)[task]
        assert (found["label_from"], found["test"]) == ("same_token", 70.0)


def test_what_was_measured_of_another_adapter_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []

    def sts(encoder: Encoder, folder: Path, pooling: str, split: str) -> float:
        measured.append(split)
        return 1.0

    monkeypatch.setattr(measure, "_sts", sts)
    encoder = Encoder("any", "Any", stage="mntp")
    (tmp_path / "mntp").mkdir()
    for content, times in ((b"one", 2), (b"one", 2), (b"another", 4)):
        (tmp_path / "mntp" / ADAPTER_WEIGHTS).write_bytes(content)
        assert sts_scores(encoder, tmp_path)["machine"]["date"]
        assert len(measured) == times
