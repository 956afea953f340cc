"""A run of a training stage, and what happened in it: its batches, and of each update the gradients and the weights.

Run as a program it records one process of several: ``recorded_training.py STAGE OPTIONS.json RECORDS``, where each rank
writes RECORDS-RANK.pt.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from llm2vec_fast import training
from llm2vec_fast.training import ContrastiveTrainer, MntpTrainer
from llm2vec_fast.training.run import StageTrainer
from llm2vec_fast.training.word_level.stage import WordLevelTrainer

STAGES = {
    "mntp": ("MntpArguments", "train_mntp"),
    "simcse": ("SimcseArguments", "train_simcse"),
    "contrastive": ("ContrastiveArguments", "train_contrastive"),
    "word-level": ("WordLevelArguments", "train_word_level"),
}
TRAINERS = {
    "mntp": MntpTrainer,
    "simcse": ContrastiveTrainer,
    "contrastive": ContrastiveTrainer,
    "word-level": WordLevelTrainer,
}


@dataclass
class Record:
    """What one process did: the trained weights before the first update, and of each update its batches.

    ``gradients`` are those that the optimiser was given; ``losses``, ``norms`` and ``evaluated``, the losses on the
    validation files after each update, are what the log told. ``validation`` are the batches of each evaluation.
    """

    before: dict[str, Tensor] = field(default_factory=dict)
    batches: list[list[dict[str, Tensor]]] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    weights: list[dict[str, Tensor]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    evaluated: list[float] = field(default_factory=list)
    validation: list[list[dict[str, Tensor]]] = field(default_factory=list)


class _Interrupted(BaseException):
    """As a process that is ended."""


class _Recorder(TrainerCallback):
    def __init__(self, interrupted: bool) -> None:
        self.record, self._interrupted = Record(), interrupted
        self.seen: list[dict[str, Tensor]] = []  # batches of the evaluation under way

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        self.record.before = self.record.before or _trained(model)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._interrupted:
            self._interrupted = False
            raise _Interrupted

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.record.batches.append([])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        self.record.gradients.append({
            name: torch.zeros_like(x) if x.grad is None else x.grad.detach().clone()
            for name, x in model.named_parameters()
            if x.requires_grad
        })  # fmt: skip

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        self.record.weights.append(_trained(model))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        if "loss" in logs:
            self.record.losses.append(float(logs["loss"]))
            self.record.norms.append(float(logs["grad_norm"]))
        if "eval_loss" in logs and len(self.record.evaluated) < len(self.record.losses):  # once more at the end
            self.record.evaluated.append(float(logs["eval_loss"]))
            self.record.validation.append(self.seen)
        self.seen = []


def recorded(stage: str, options: Mapping[str, Any], interrupted: bool = False) -> Record:
    """Train a stage; ``interrupted`` at its first checkpoint, and started again."""
    recorder, step = _Recorder(interrupted), StageTrainer.training_step

    def watched(self: StageTrainer, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        recorder.record.batches[-1].append(_copy(inputs))
        return step(self, model, inputs, *args, **kwargs)

    def evaluated(self: StageTrainer, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        recorder.seen.append(_copy(inputs))
        return evaluate(self, model, inputs, *args, **kwargs)

    kind = TRAINERS[stage]
    evaluate = kind.prediction_step
    with patch.object(kind, "prediction_step", evaluated):
        with suppress(_Interrupted):
            run_with(watched, stage, options, recorder)
            interrupted = False
        if interrupted:
            run_with(watched, stage, options, recorder)
    return recorder.record


def run_with(training_step: Callable[..., Tensor], stage: str, options: Mapping[str, Any], *callbacks: Any) -> None:
    """Train a stage by another training step."""
    arguments, train = (getattr(training, name) for name in STAGES[stage])
    with patch.object(StageTrainer, "training_step", training_step):
        train(arguments(**options), callbacks=callbacks)


def _copy(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in batch.items() if torch.is_tensor(x)}


def _trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: x.detach().clone() for name, x in model.named_parameters() if x.requires_grad}


if __name__ == "__main__":
    found = recorded(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()))
    torch.save(vars(found), f"{sys.argv[3]}-{os.environ['RANK']}.pt")
