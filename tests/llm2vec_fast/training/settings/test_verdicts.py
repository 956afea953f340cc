"""Every setting of transformers, in every stage: its verdict, and that the verdict is true."""

from __future__ import annotations

import dataclasses
import gc
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import TrainingArguments

from llm2vec_fast.errors import UserError
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
from llm2vec_fast.training.mntp import MntpCollator
from llm2vec_fast.training.models import load_model
from llm2vec_fast.training.settings.verdicts import CONTRASTIVE, MNTP, SIMCSE, STAGES, VERDICTS, WORD_LEVEL, Kind

RUN = {
    MNTP: (train_mntp, MntpArguments, {"line_by_line": True, "lora_dropout": 0.0}),
    SIMCSE: (train_simcse, SimcseArguments, {"lora_dropout": 0.0, "scale": 5.0}),
    CONTRASTIVE: (train_contrastive, ContrastiveArguments, {"lora_dropout": 0.0, "scale": 5.0}),
    WORD_LEVEL: (train_word_level, WordLevelArguments, {"classifier_dropout": 0.0}),
}
# Another value than any stage's default, of every setting that is refused or without effect anywhere.
OTHER: dict[str, Any] = {
    "average_tokens_across_devices": False, "label_smoothing_factor": 0.1, "neftune_noise_alpha": 5.0,
    "activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False},
    "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "use_liger_kernel": True, "liger_kernel_config": {"rope": True}, "use_cache": True, "auto_find_batch_size": True,
    "logging_nan_inf_filter": True, "include_num_input_tokens_seen": "non_padding", "prediction_loss_only": True,
    "include_for_metrics": ["loss"], "batch_eval_metrics": True, "eval_do_concat_batches": False,
    "eval_use_gather_object": True, "label_names": ["labels"], "push_to_hub": True, "hub_model_id": "a/b",
    "hub_strategy": "end", "hub_token": "secret", "hub_private_repo": True, "hub_always_push": True,
    "hub_revision": "x", "dataloader_drop_last": True, "remove_unused_columns": True, "bf16_full_eval": True,
    "fp16_full_eval": True, "train_sampling_strategy": "group_by_length", "length_column_name": "n",
    "parallelism_config": object(), "fsdp": True, "deepspeed": {"a": 1},
    "do_predict": True,
}  # fmt: skip
INSTALLED = {item.name for item in dataclasses.fields(TrainingArguments) if item.init}

Make = Callable[..., Any]


@pytest.fixture
def make(settings: Callable[..., dict[str, object]], files: dict[str, str]) -> Make:
    """Arguments of a stage."""

    def make(stage: str, **changes: object) -> Any:
        changes = {name: files[stage] if x == "ITS FILE" else x for name, x in changes.items()}
        plain = {"train_file": files[stage], "max_steps": 2, "warmup_steps": 0, "save_strategy": "no"}
        return RUN[stage][1](**settings(**{**plain, **RUN[stage][2], **changes}))

    return make


def test_every_setting_of_the_installed_transformers_has_a_verdict_in_every_stage() -> None:
    assert not INSTALLED - set(VERDICTS)
    assert all(tuple(sorted(of)) == tuple(sorted(STAGES)) for of in VERDICTS.values())


def test_what_a_later_transformers_adds_is_told_and_passed_on(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delitem(VERDICTS, "adam_epsilon")
    assert make(MNTP, adam_epsilon=1e-5).adam_epsilon == 1e-5
    assert "adam_epsilon=1e-05 is passed on to transformers as it is: it was not tried in mntp" in caplog.text


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_refused_is_named_and_what_has_no_effect_is_said(
    stage: str, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """Before the model is looked for: there is none."""
    kinds = {name: of[stage].kind for name, of in VERDICTS.items() if name in INSTALLED}
    absent = {"model_name_or_path": "nowhere", "validation_file": "ITS FILE"}
    for name in (name for name, kind in kinds.items() if kind is Kind.REFUSED):
        with pytest.raises(UserError, match=rf"^{name}=.* is refused in {stage}: \w"):
            make(stage, **absent, **{name: OTHER[name]})
    own = {item.name: item.default for item in dataclasses.fields(RUN[stage][1])}
    for name in (name for name, kind in kinds.items() if kind is Kind.NO_EFFECT):
        caplog.clear()
        value = OTHER[name] if OTHER[name] != own[name] else not OTHER[name]
        make(stage, **absent, **{name: value})
        assert f"{name}=" in caplog.text
        assert f"does nothing in {stage}: " in caplog.text
    assert "secret" not in caplog.text


def test_defaults_and_what_is_switched_off_ask_for_nothing(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    off = {"gradient_checkpointing": False, "fsdp": "", "fsdp_config": {}, "push_to_hub": False, "optim_args": ""}
    for stage in STAGES:
        dataclasses.replace(make(stage, **off))  # and neither do arguments that were settled before
    told = [line for line in caplog.messages if not line.startswith("fsdp_config=")]  # transformers 5.2 fills it in
    assert told == []


EVALUATED = {"validation_file": "ITS FILE", "eval_strategy": "steps", "eval_steps": 1}
CHECKPOINTED = {"save_strategy": "steps", "save_steps": 1}
# In the stages with code of their own between the setting and the step; the rest of the Trainer is the same for all.
OTHER_WEIGHTS: dict[str, dict[str, Any]] = {
    "per_device_train_batch_size": {"per_device_train_batch_size": 4},
    "weight_decay": {"weight_decay": 0.5},
    "max_grad_norm": {"max_grad_norm": 0.01},
    "gradient_accumulation_steps": {"gradient_accumulation_steps": 2},
    "bf16": {"bf16": True},
    "data_seed": {"data_seed": 7},
}
SAME_WEIGHTS: dict[str, dict[str, Any]] = {
    "dataloader_num_workers": {"dataloader_num_workers": 1},
    "eval_strategy": {**EVALUATED, **CHECKPOINTED, "eval_on_start": True, "eval_accumulation_steps": 1},
}
ONLY_IN_MNTP: dict[str, dict[str, dict[str, Any]]] = {
    "other": {
        "max_steps": {"max_steps": 1},
        "learning_rate": {"learning_rate": 1e-3},
        "lr_scheduler_type": {"lr_scheduler_type": "constant"},
        "lr_scheduler_kwargs": {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 3.0}},
        "warmup_steps": {"warmup_steps": 0.6},
        "optim": {"optim": "adafactor"},
        "adam_beta1": {"adam_beta1": 0.5},
        "adam_beta2": {"adam_beta2": 0.5},
        "adam_epsilon": {"adam_epsilon": 0.1},
        "seed": {"seed": 7},
        "num_train_epochs": {"max_steps": -1, "num_train_epochs": 0.4},
        "label_smoothing_factor": {"label_smoothing_factor": 0.2},
        "neftune_noise_alpha": {"neftune_noise_alpha": 5.0},
        "train_sampling_strategy": {"train_sampling_strategy": "sequential"},
        "use_seedable_sampler": {"accelerator_config": {"use_seedable_sampler": False}},
    },
    "same": {
        "activation_checkpointing": {"gradient_checkpointing": True},
        "full_determinism": {"full_determinism": True, "torch_empty_cache_steps": 1, "skip_memory_metrics": False},
        "save_only_model": {**CHECKPOINTED, "save_only_model": True, "logging_strategy": "epoch"},
        "auto_find_batch_size": {"auto_find_batch_size": True},
    },
}


@pytest.fixture
def quick() -> Iterator[None]:
    """accelerate collects garbage after every run: not that of all that was imported."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def weights(quick: None, make: Make, tmp_path: Path) -> Callable[..., bytes]:
    """What a run of two steps comes to, bit for bit."""

    def weights(stage: str, number: int, **changes: object) -> bytes:
        folder = tmp_path / f"out-{number}"
        RUN[stage][0](make(stage, output_dir=str(folder), **changes))
        tensors = load_file(next(folder.glob("*.safetensors")))
        return b"".join(tensors[name].float().numpy().tobytes() for name in sorted(tensors))

    return weights


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_honoured_changes_what_it_should(stage: str, weights: Callable[..., bytes]) -> None:
    """Other weights where the setting is about the steps, the same bits where it is about how they are taken."""
    other, same = dict(OTHER_WEIGHTS), dict(SAME_WEIGHTS)
    if stage == SIMCSE:  # evaluating draws from the generator that dropout's seed comes from, as it does with stock
        same.pop("eval_strategy")
    if stage == MNTP:
        other, same = other | ONLY_IN_MNTP["other"], same | ONLY_IN_MNTP["same"]
    plain = weights(stage, 0)
    assert weights(stage, 1) == plain
    assert [name for i, (name, x) in enumerate(other.items(), 2) if weights(stage, i, **x) == plain] == []
    assert [name for i, (name, x) in enumerate(same.items(), 100) if weights(stage, i, **x) != plain] == []
    every = VERDICTS.keys() & INSTALLED & (other.keys() | same.keys())
    assert all(VERDICTS[name][stage].kind is Kind.HONOURED for name in every)


def test_what_is_written_and_logged_is_what_was_asked_for(make: Make, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    own = {**EVALUATED, "max_steps": 4, "eval_delay": 3, "save_strategy": "steps", "save_steps": 1}
    own |= {"save_total_limit": 1, "logging_steps": 3, "logging_first_step": True}
    train_simcse(make(SIMCSE, **own))
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-4"]
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    assert [line["step"] for line in history if "loss" in line] == [1, 3]
    assert [line["step"] for line in history if "eval_loss" in line] == [3, 4]


@pytest.mark.parametrize("stage", STAGES)
def test_the_best_checkpoint_is_kept(stage: str, make: Make, tmp_path: Path) -> None:
    own = {**EVALUATED, **CHECKPOINTED, "load_best_model_at_end": True, "greater_is_better": True, "max_steps": 3}
    RUN[stage][0](make(stage, **own, metric_for_best_model="loss", learning_rate=1e-3))
    best = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["best_global_step"]
    ours, kept = (load_file(next(path.glob("*.safetensors"))) for path in (
        tmp_path / "out", tmp_path / "out" / f"checkpoint-{best}"))  # fmt: skip
    assert sorted(map(str, (x.double().norm().item() for x in ours.values()))) == sorted(
        map(str, (x.double().norm().item() for x in kept.values()))
    )


def test_smoothed_labels_give_the_loss_of_pytorchs_own(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """On hidden tokens alone, each from the output before it: the first step's, as the log has it."""
    batches: list[dict[str, Tensor]] = []
    collate = MntpCollator.__call__

    def kept(collator: MntpCollator, rows: Any) -> dict[str, Tensor]:
        batches.append(collate(collator, rows))
        return dict(batches[-1])

    monkeypatch.setattr(MntpCollator, "__call__", kept)
    arguments = make(MNTP, label_smoothing_factor=0.3, max_steps=1)
    loss = train_mntp(arguments).training_loss
    stage, batch = load_model(arguments, head=True), batches[0]
    logits = stage.model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
    expected = cross_entropy(logits[0, :-1], batch["labels"][0, 1:], ignore_index=-100, label_smoothing=0.3)
    assert loss == pytest.approx(expected.item(), rel=1e-4)
    plain = cross_entropy(logits[0, :-1], batch["labels"][0, 1:], ignore_index=-100)
    assert loss != pytest.approx(plain.item(), rel=1e-3)
