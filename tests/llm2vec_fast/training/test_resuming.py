"""What a run goes on from, and what it refuses to go on from or to write over."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from reference_data import FOLDER
from safetensors.torch import load_file

from llm2vec_fast.errors import UserError
from llm2vec_fast.training import (
    MntpArguments,
    SimcseArguments,
    WordLevelArguments,
    train_mntp,
    train_simcse,
    train_word_level,
)
from llm2vec_fast.training.checkpoints import last_checkpoint, told_if_unwritable
from llm2vec_fast.training.resuming import checkpoint_to_resume

Settings = Callable[..., dict[str, object]]


@pytest.fixture
def trained(settings: Settings, tmp_path: Path) -> Path:
    """The output folder of a run of four steps with two checkpoints."""
    train_mntp(MntpArguments(**settings(max_steps=4)))
    return tmp_path / "out"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"mlm_probability": 0.5}, "mlm_probability 0.2 -> 0.5"),
        ({"seed": 7}, "seed 42 -> 7"),
        ({"weight_decay": 0.1}, "weight_decay 0.0 -> 0.1"),
        ({"lora_r": 4}, "lora_r 16 -> 4"),
        ({"dataloader_drop_last": True}, "dataloader_drop_last False -> True"),
        ({"gradient_accumulation_steps": 2}, "sequences_of_a_step 8 -> 16"),
        ({"peft_model_name_or_path": ["other"]}, r"peft_model_name_or_path \[\] -> \['other'\]"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_a_folder_of_another_run_is_refused_and_left_as_it_is(
    changes: dict[str, object], told: str, settings: Settings, trained: Path
) -> None:
    before = contents(trained)
    with pytest.raises(UserError, match=rf"out has checkpoint-4 of a run with other settings \({told}\): give these"):
        checkpoint_to_resume(MntpArguments(**settings(**changes)))
    assert contents(trained) == before


def test_other_texts_and_another_stage_are_another_run(settings: Settings, corpus: str, trained: Path) -> None:
    with pytest.raises(UserError, match=r"\(stage mntp -> simcse\): give these"):
        train_simcse(SimcseArguments(**settings()))
    with Path(corpus).open("a") as file:
        file.write("one more text\n")
    with pytest.raises(
        UserError, match=r"\(train_file \['corpus.txt of [\d,]+ bytes with SHA-256 \w+'\] -> \['corpus.txt of"
    ):
        train_mntp(MntpArguments(**settings()))


def test_an_adapter_that_was_trained_anew_is_another_one(settings: Settings, trained: Path) -> None:
    given = {"peft_model_name_or_path": [str(trained)], "max_steps": 1, "save_steps": 1, "max_seq_length": 48}
    train_simcse(SimcseArguments(**settings("next", **given)))
    shutil.copy(trained / "checkpoint-2" / "adapter_model.safetensors", trained)
    with pytest.raises(UserError, match=r"peft_model_name_or_path .* with SHA-256 \w+'\] -> .* with SHA-256"):
        checkpoint_to_resume(SimcseArguments(**settings("next", **given)))


def test_results_without_a_checkpoint_are_not_written_over(settings: Settings, trained: Path) -> None:
    for checkpoint in trained.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    with pytest.raises(UserError, match=r"out has adapter_model\.safetensors of a run with other settings \(seed"):
        checkpoint_to_resume(MntpArguments(**settings(seed=7)))


def test_a_folder_that_does_not_tell_its_run_is_refused(settings: Settings, trained: Path) -> None:
    (trained / "run.json").unlink()
    with pytest.raises(UserError, match=r"other settings \(nothing tells which\)"):
        checkpoint_to_resume(MntpArguments(**settings()))


def test_a_run_that_left_nothing_may_be_begun_with_other_settings(settings: Settings, tmp_path: Path) -> None:
    assert checkpoint_to_resume(MntpArguments(**settings())) is None
    assert checkpoint_to_resume(MntpArguments(**settings(seed=7))) is None
    assert json.loads((tmp_path / "out" / "run.json").read_text())["seed"] == 7


def test_a_run_may_go_on_for_longer_and_elsewhere_by_name(settings: Settings, trained: Path) -> None:
    assert checkpoint_to_resume(MntpArguments(**settings(max_steps=6, save_steps=3))) == str(trained / "checkpoint-4")
    other = settings(seed=7, resume_from_checkpoint=str(trained / "checkpoint-2"))
    assert checkpoint_to_resume(MntpArguments(**other)) == str(trained / "checkpoint-2")
    with pytest.raises(UserError, match="resume_from_checkpoint=nowhere is no whole checkpoint"):
        checkpoint_to_resume(MntpArguments(**settings(resume_from_checkpoint="nowhere")))


@pytest.mark.parametrize("length", [{"max_steps": 3, "save_steps": 3}, {"max_steps": -1, "num_train_epochs": 1}])
def test_a_finished_run_is_not_trained_on(
    length: dict[str, int], settings: Settings, corpus: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Steps end within an epoch, where transformers would train one more; the same command changes nothing."""
    options = settings(**length, save_strategy="epoch" if "num_train_epochs" in length else "steps")
    first = train_mntp(MntpArguments(**options))
    before = contents(tmp_path / "out")
    again = train_mntp(MntpArguments(**options))
    assert again[:2] == first[:2]
    assert "is the end of this run: nothing is trained" in caplog.text
    assert contents(tmp_path / "out") == before
    evaluated = train_mntp(MntpArguments(**options, validation_file=[corpus]))
    assert evaluated.metrics["eval_loss"] > 0
    assert evaluated.metrics["train_loss"] == first.training_loss


def test_a_run_that_ended_before_it_wrote_its_results_writes_them(settings: Settings, trained: Path) -> None:
    expected = (trained / "adapter_model.safetensors").read_bytes()
    (trained / "adapter_model.safetensors").unlink()
    train_mntp(MntpArguments(**settings(max_steps=4)))
    assert (trained / "adapter_model.safetensors").read_bytes() == expected


def test_a_finished_head_is_not_trained_on(settings: Settings, files: dict[str, str], tmp_path: Path) -> None:
    options = settings(train_file=files["word-level"], test_file=[files["word-level"]], max_seq_length=48, max_steps=3)
    options["save_steps"] = 3
    first = train_word_level(WordLevelArguments(**options))
    before = contents(tmp_path / "out")
    again = train_word_level(WordLevelArguments(**options))
    assert again.training_loss == first.training_loss
    assert again.metrics["test_accuracy"] == first.metrics["test_accuracy"]
    for name in ("head.safetensors", "train_results.json"):
        assert (tmp_path / "out" / name).read_bytes() == before[name]


def test_a_run_goes_on_at_the_learning_rate_that_is_asked_for(settings: Settings, tmp_path: Path) -> None:
    """As one that was asked for it from the same checkpoint on: the scheduler's own state would keep the old one."""

    def rates(**changes: object) -> list[float]:
        train_mntp(MntpArguments(**settings(**changes)))
        state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
        return [line["learning_rate"] for line in state["log_history"] if "loss" in line]

    plain = {"max_grad_norm": 0, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2}
    assert rates(max_steps=2, **plain) == pytest.approx([0, 5e-3])
    before = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert rates(max_steps=3, learning_rate=1e-9, **plain) == pytest.approx([0, 5e-3, 1e-9])
    after = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert 0 < max(float((before[name] - after[name]).abs().max()) for name in before) < 1e-7


@pytest.mark.parametrize("input", ["model", "adapter"])
def test_what_training_starts_from_is_not_written_over(input: str, settings: Settings, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(FOLDER / ("llama" if input == "model" else "llama-lora"), source)
    given = {"model_name_or_path": str(source)} if input == "model" else {"peft_model_name_or_path": [str(source)]}
    before = contents(source)
    options = settings("out/../source", **given)
    with pytest.raises(UserError, match=r"source is \w+_name_or_path, too, and would be overwritten"):
        train_mntp(MntpArguments(**options))
    assert contents(source) == before


def test_a_head_is_not_written_over_by_another(settings: Settings, files: dict[str, str]) -> None:
    def options(**changes: object) -> WordLevelArguments:
        return WordLevelArguments(**settings(train_file=files["word-level"], max_seq_length=48, **changes))

    train_word_level(options(save_strategy="no"))
    with pytest.raises(UserError, match=r"head\.safetensors of a run with other settings \(classifier_dropout"):
        train_word_level(options(classifier_dropout=0.2))


def test_a_checkpoint_with_damaged_weights_is_passed_over(trained: Path) -> None:
    assert last_checkpoint(trained) == str(trained / "checkpoint-4")
    weights = trained / "checkpoint-4" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert last_checkpoint(trained) == str(trained / "checkpoint-2")


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), RuntimeError("other")])
def test_an_error_of_another_kind_is_not_told_as_a_full_disk(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error), match=str(error.args[-1])), told_if_unwritable(tmp_path):
        raise error


def test_reading_what_is_damaged_is_not_told_as_a_full_disk(tmp_path: Path) -> None:
    (tmp_path / "damaged.safetensors").write_bytes(b"12345678")
    with pytest.raises(Exception, match="deserializing"), told_if_unwritable(tmp_path):
        load_file(tmp_path / "damaged.safetensors")


def test_the_learned_scale_goes_back_to_the_best_step(settings: Settings, corpus: str, tmp_path: Path) -> None:
    options = {"learn_scale": True, "validation_file": [corpus], "eval_strategy": "steps", "eval_steps": 1}
    options |= {"save_steps": 1, "load_best_model_at_end": True, "max_seq_length": 48, "max_steps": 3}
    options |= {"attention_dropout": 0.0, "lora_dropout": 0.0, "learning_rate": 0.1}
    options |= {"greater_is_better": True}  # the first step's is the greatest
    train_simcse(SimcseArguments(**settings(**options)))
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    evaluated = [line["eval_loss"] for line in state["log_history"] if "eval_loss" in line]
    best = state["best_global_step"]
    assert best < 3
    for _ in range(2):
        at_the_end = json.loads((tmp_path / "out" / "eval_results.json").read_text())["eval_loss"]
        assert at_the_end == pytest.approx(evaluated[best - 1], rel=1e-6)
        train_simcse(SimcseArguments(**settings(**options)))  # done: the best step's it stays
    scales = [line["scale"] for line in state["log_history"] if "scale" in line]
    assert len(set(scales)) == 3
    assert torch.isfinite(torch.tensor(scales)).all()
