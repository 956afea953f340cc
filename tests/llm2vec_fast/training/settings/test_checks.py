"""Settings that do not fit each other or this machine: one sentence, before a model is loaded or a text is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from types import SimpleNamespace

import pytest
from tiny_models import tiny_model
from transformers import Trainer

from llm2vec_fast import make_bidirectional
from llm2vec_fast.acceleration import accelerate
from llm2vec_fast.errors import UserError
from llm2vec_fast.training import (
    ContrastiveArguments,
    MntpArguments,
    SimcseArguments,
    WordLevelArguments,
    train_contrastive,
)
from llm2vec_fast.training.settings import checks

Settings = Callable[..., dict[str, object]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_strategy": "steps"}, "eval_strategy=steps needs validation_file"),
        ({"eval_on_start": True}, "eval_on_start=True needs validation_file"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end=True needs validation_file"),
        ({"save_strategy": "best", "metric_for_best_model": "loss"}, "save_strategy=best needs validation_file"),
        ({"save_strategy": "best", "validation_file": "v"}, "save_strategy=best needs evaluations"),
        ({"metric_for_best_model": "f1"}, "metric_for_best_model=f1 is nothing that .* evaluates: give one of loss"),
        ({"dataloader_persistent_workers": True}, "dataloader_persistent_workers=True needs workers"),
        ({"dataloader_prefetch_factor": 2}, "dataloader_prefetch_factor=2 needs workers"),
        ({"train_sampling_strategy": "longest"}, "train_sampling_strategy=longest is (unknown|refused)"),
        ({"fp16": True}, "fp16=True needs a GPU and this run is on the CPU: give bf16"),
        ({"tf32": True}, "tf32 requires Ampere"),
        ({"optim": "adamw_8bit"}, "optim=adamw_8bit cannot be used: You need to install `bitsandbytes`"),
        ({"optim": "sgd", "optim_args": "momentum"}, "optim=sgd optim_args=momentum cannot be used"),
        ({"lr_scheduler_kwargs": {"a": 1}}, "lr_scheduler_kwargs={'a': 1} cannot be used"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_type=cosine_with_min_lr cannot be used"),
        ({"report_to": "wandb"}, r"report_to=\['wandb'\] cannot be used: .* requires wandb"),
        ({"report_to": "nope"}, r"report_to=\['nope'\] cannot be used"),
        ({"torch_compile_backend": "nope"}, "torch_compile_backend=nope cannot be used"),
        ({"accelerator_config": {"split_batches": True}}, "accelerator_config has split_batches=True"),
        ({"accelerator_config": {"dispatch_batches": True}}, "accelerator_config has dispatch_batches=True"),
        ({"accelerator_config": {"even_batches": False}}, "accelerator_config has even_batches=False"),
        ({"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 2}}}, "has num_steps"),
        ({"accelerator_config": {"no_such": 2}}, "no_such"),
        ({"accelerator_config": "nowhere.json"}, "nowhere.json"),
        ({"ddp_backend": "gloo"}, "ddp_backend=gloo needs several processes"),
        ({"debug": "nope"}, "nope is not a valid DebugOption"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
@pytest.mark.parametrize("kind", [MntpArguments, ContrastiveArguments, WordLevelArguments])
def test_a_setting_that_cannot_be_is_refused_by_name(
    kind: type, changes: dict[str, object], message: str, settings: Settings
) -> None:
    """None of the files exists, nor the model."""
    with pytest.raises(UserError, match=message):
        kind(**settings(**{"model_name_or_path": "nowhere", "train_file": "nothing", **changes}))


@pytest.mark.parametrize("kwargs", ["activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"])
def test_activations_are_offloaded_from_a_gpu_alone(kwargs: str, settings: Settings) -> None:
    if not hasattr(MntpArguments, kwargs):
        pytest.skip("this transformers has no such setting")
    with pytest.raises(UserError, match=rf"^{kwargs}=.* needs a GPU to offload from"):
        MntpArguments(**settings(gradient_checkpointing=True, **{kwargs: {"offload": True}}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_steps": 2}, "eval_steps=2 does nothing without eval_strategy"),
        ({"run_name": "x"}, "run_name=x does nothing without report_to"),
        ({"optim_args": "momentum=0.9"}, "optim_args=momentum=0.9 does nothing: optim=adamw_torch_fused does not"),
        ({"optim": "sgd", "adam_beta1": 0.5}, "adam_beta1=0.5 does nothing: optim=sgd does not read it"),
        ({"lr_scheduler_type": "constant", "warmup_steps": 5}, "warmup_steps=5 does nothing: lr_scheduler_type=con"),
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 5}, None),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_a_setting_that_nothing_reads_is_told(
    changes: dict[str, object], message: str | None, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = MntpArguments(**settings(**changes))
    assert message in caplog.text if message else "does nothing" not in caplog.text
    assert all(getattr(arguments, name) == value for name, value in changes.items())


def test_only_the_first_process_warns(
    settings: Settings, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    MntpArguments(**settings(hub_model_id="a/b"))
    assert not caplog.text


def rates(settings: Settings, files: dict[str, str], **changes: object) -> list[float]:
    seen: list[float] = []
    given = settings(train_file=files["contrastive"], save_strategy="no", learning_rate=1e-3, **changes)
    trainer = train_contrastive(ContrastiveArguments(**given), callbacks=[_Rates(seen)])
    assert trainer.global_step == len(seen)
    return seen


class _Rates:
    """A callback, by its duck type: the learning rates of the log."""

    def __init__(self, seen: list[float]) -> None:
        self._seen = seen

    def __getattr__(self, name: str) -> Callable[..., None]:
        if not name.startswith("on_"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self._log(kwargs.get("logs") or {}) if name == "on_log" else None

    def _log(self, logs: dict[str, float]) -> None:
        self._seen.extend([logs["learning_rate"]] if "loss" in logs else [])


def test_a_short_contrastive_run_reaches_its_learning_rate(
    settings: Settings, files: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    assert max(rates(settings, files, max_steps=6)) == pytest.approx(1e-3)
    assert "outlives" not in caplog.text


def test_a_warmup_that_outlives_the_run_is_kept_and_told(
    settings: Settings, files: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    assert max(rates(settings, files, max_steps=4, warmup_steps=300)) == pytest.approx(1e-5)
    assert "warmup_steps=300 outlives this run of 4 steps: the learning rate rises to 1 % of" in caplog.text


def test_the_learned_scale_is_not_decayed(settings: Settings, files: dict[str, str]) -> None:
    """Its first step is the same with and without decay, as is the gradient."""

    def scale(decay: float) -> float:
        seen: list[float] = []
        given = {"learn_scale": True, "weight_decay": decay, "warmup_steps": 0, "lr_scheduler_type": "constant"}
        options = settings(str(decay), train_file=files["contrastive"], max_steps=2, save_strategy="no", **given)
        train_contrastive(ContrastiveArguments(**options), callbacks=[_Scales(seen)])
        assert seen[0] != seen[1]
        return seen[1]

    assert scale(0.9) == scale(0.0)


class _Scales(_Rates):
    def _log(self, logs: dict[str, float]) -> None:
        self._seen.extend([logs["scale"]] if "scale" in logs else [])


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_swapped_modules_decay_what_stock_ones_do(family: str) -> None:
    """Where all weights are trained: norms and biases are left alone."""

    def decayed() -> list[str]:
        return Trainer.get_decay_parameter_names(SimpleNamespace(), model)

    model = tiny_model(family)
    before = decayed()
    accelerate(make_bidirectional(model))
    assert decayed() == before
    assert not [name for name in before if "norm" in name or "bias" in name]


@pytest.mark.parametrize(
    ("kind", "changes", "refused"),
    [
        (SimcseArguments, {"token_budget": 40}, "token_budget=40 ."),
        (ContrastiveArguments, {"gradient_accumulation_steps": 2}, "token_budget=192 .accumulated batches set one."),
        (MntpArguments, {"ddp_find_unused_parameters": True}, "ddp_find_unused_parameters=True"),
        (MntpArguments, {"gradient_accumulation_steps": 2}, None),
        (SimcseArguments, {}, None),
    ],
)
@pytest.mark.parametrize("old", [True, False], ids=["gradient_checkpointing", "activation_checkpointing"])
def test_reentrant_checkpointing_that_lets_processes_train_apart_is_refused(
    kind: type, changes: dict, refused: str | None, old: bool, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients would be exchanged after the first piece: each process would step by others than the rest."""
    name = "gradient_checkpointing" if old else "activation_checkpointing"
    if name not in {item.name for item in fields(kind)}:
        pytest.skip("an older transformers has the older name alone")

    def made(options: dict[str, object], processes: int = 2) -> None:
        monkeypatch.setattr(checks, "_started", lambda: processes)
        monkeypatch.setattr(kind, "world_size", processes)
        kind(**settings(**changes, **{name: True, f"{name}_kwargs": options}))

    for fine in ({"use_reentrant": False}, {}):
        made(fine)
    made({"use_reentrant": True}, processes=1)
    for options in ({"use_reentrant": True}, {"preserve_rng_state": True}):  # PyTorch takes what is left out for true
        if refused is None:
            made(options)
        else:
            with pytest.raises(UserError, match=f"is reentrant, which does not go with {refused}.*over several"):
                made(options)
