"""What a run leaves: its results, whatever evaluation does to the weights in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llm2vec_fast.training import MntpArguments, WordLevelArguments, train_mntp, train_word_level
from llm2vec_fast.training.mntp import MntpTrainer
from llm2vec_fast.training.word_level.stage import WordLevelTrainer

Settings = Callable[..., dict[str, object]]
STAGES = {
    "mntp": (MntpArguments, train_mntp, MntpTrainer, "adapter_model.safetensors"),
    "word-level": (WordLevelArguments, train_word_level, WordLevelTrainer, "head.safetensors"),
}


@pytest.fixture(params=STAGES)
def stage(request: pytest.FixtureRequest, settings: Settings, files: dict[str, str], tmp_path: Path) -> tuple:
    """What trains for two steps into a folder, evaluated after each of them and at the end; and the weights there."""
    kind, train, trainer, name = STAGES[request.param]

    def run(output: str, **changes: object) -> dict[str, float]:
        some = {"train_file": files[request.param], "validation_file": [files[request.param]], "max_seq_length": 48}
        some |= {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 2}
        return train(kind(**settings(output, **some, **changes))).metrics

    return run, lambda output: load_file(tmp_path / output / name), trainer


def assert_equal(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    assert some.keys() == others.keys()
    for key, x in others.items():
        assert some[key].dtype == x.dtype
        assert torch.equal(some[key], x), key


@pytest.mark.parametrize("stage", ["mntp"], indirect=True)
def test_evaluation_in_16_bits_leaves_the_weights_that_are_saved_as_they_are(stage: tuple) -> None:
    run, weights, _ = stage
    exact = run("plain")
    rounded = run("rounded", bf16_full_eval=True)
    assert_equal(weights("rounded"), weights("plain"))
    assert rounded["eval_loss"] == pytest.approx(exact["eval_loss"], rel=0.02)
    run("rounded", bf16_full_eval=True)  # a finished run is evaluated once more, and saved as it was
    assert_equal(weights("rounded"), weights("plain"))


def test_results_are_on_disk_before_they_are_evaluated(stage: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    run, weights, trainer = stage
    run("plain")
    step = trainer.prediction_step

    def fail(self: MntpTrainer, *args: object, **kwargs: object) -> object:
        if not self.is_in_train:
            raise torch.OutOfMemoryError("out of memory")
        return step(self, *args, **kwargs)

    monkeypatch.setattr(trainer, "prediction_step", fail)
    with pytest.raises(torch.OutOfMemoryError):
        run("failed")
    assert_equal(weights("failed"), weights("plain"))
