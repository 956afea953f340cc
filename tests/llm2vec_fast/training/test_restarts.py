"""A run killed in its middle, and started again: the losses and weights of one that nothing interrupted."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainerControl

from llm2vec_fast.training import (
    ContrastiveArguments,
    MntpArguments,
    SimcseArguments,
    WordLevelArguments,
    train_contrastive,
    train_mntp,
    train_simcse,
    train_word_level,
)

# Of each stage what is drawn at random is on; two epochs and more; a learning rate that changes with every step.
_WORKERS = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
STAGES = {
    "mntp": (MntpArguments, train_mntp, {"mask_token_type": "eos", "line_by_line": True}),
    "simcse": (SimcseArguments, train_simcse, {"attention_dropout": 0.3, "learn_scale": True}),
    "contrastive": (
        ContrastiveArguments,
        train_contrastive,
        {"attention_dropout": 0.3, "token_budget": 200, **_WORKERS},
    ),
    "word-level": (WordLevelArguments, train_word_level, {"classifier_dropout": 0.3}),
}
STEPS, SAVED = 16, 4


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As the processes that `launch` starts: the order of sums, and so the last bits, depend on the threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_takes_callbacks(stage: str, settings: Callable[..., dict[str, object]], files: dict[str, str]) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: object, state: object, control: TrainerControl, **_: object) -> None:
            control.should_training_stop = True

    kind, train, own = STAGES[stage]
    result = train(kind(**settings(train_file=files[stage], max_seq_length=48, **own)), callbacks=[Stop()])
    assert result.global_step == 1


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_run_goes_on_to_the_same_weights(
    stage: str, settings: Callable[..., dict[str, object]], launch: Callable, files: dict[str, str], tmp_path: Path
) -> None:
    kind, train, own = STAGES[stage]
    shared = {"max_steps": STEPS, "save_steps": SAVED, "lr_scheduler_type": "cosine", "warmup_steps": 3}
    shared |= {"max_seq_length": 48, "per_device_train_batch_size": 240 if stage == "word-level" else 8}

    def options(output: str) -> dict[str, object]:
        return settings(output, train_file=files[stage], **shared, **own)

    train(kind(**options("whole")))
    process = launch(stage, options("cut"))
    deadline = time.monotonic() + 200
    while not (tmp_path / "cut" / f"checkpoint-{SAVED}" / "trainer_state.json").exists():
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    weights = "head.safetensors" if stage == "word-level" else "adapter_model.safetensors"
    assert not (tmp_path / "cut" / weights).exists()
    train(kind(**options("cut")))
    whole, cut = (load_file(tmp_path / name / weights) for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    lines = [
        json.loads((tmp_path / x / f"checkpoint-{STEPS}" / "trainer_state.json").read_text()) for x in ("whole", "cut")
    ]
    logs = [[(x["loss"], x["learning_rate"], x["grad_norm"]) for x in some["log_history"]] for some in lines]
    assert len(logs[0]) == STEPS
    assert logs[0] == logs[1]
