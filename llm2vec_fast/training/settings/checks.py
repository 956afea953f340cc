"""What is wrong with a run's settings, told in one sentence before a model is loaded or a text is read."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import TorchDynamoPlugin
from transformers import TrainingArguments, trainer_pt_utils

from llm2vec_fast.errors import UserError
from llm2vec_fast.loading import best_device
from llm2vec_fast.training.settings.verdicts import METRICS, VERDICTS, Kind, Verdict

logger = logging.getLogger(__name__)

# Of accelerate's own settings those that change which rows make a batch: packed rows are neither cut nor dealt out.
_CHANGE_BATCHES = {"split_batches": (False,), "dispatch_batches": (None, False), "even_batches": (True,)}
_OF_WORKERS = ("dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_multiprocessing_context")
_SAMPLING = ("random", "sequential", "group_by_length")
if hasattr(trainer_pt_utils, "BatchRebalanceSampler"):  # an older transformers takes any other word for random
    _SAMPLING += ("batch_rebalance",)
_OF_OPTIMIZERS = ("optim_args", "optim_target_modules", "adam_beta1", "adam_beta2", "adam_epsilon")
_WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")
_WITHOUT_KWARGS = ("constant", "constant_with_warmup")
_RUNTIME_METRICS = ("runtime", "samples_per_second", "steps_per_second")


def settle(arguments: TrainingArguments, stage: str, transformers_own: Callable[[], None]) -> None:
    """Check all of a stage's settings that are transformers', and let transformers settle them.

    Args:
        arguments: a stage's; those of its own are checked by itself.
        stage: its name.
        transformers_own: ``TrainingArguments.__post_init__`` of them.

    Raises:
        UserError: a setting is refused in this stage, out of range, does not fit another, or needs what is not there.
    """
    if str(arguments.fsdp).lower() in ("true", "false"):  # transformers knows a bare --fsdp, and not --fsdp true
        arguments.fsdp = str(arguments.fsdp).lower() == "true"
    judge(arguments, stage)
    require_choice("train_sampling_strategy", arguments.train_sampling_strategy, _SAMPLING)
    require_usable_run(arguments)
    _require_fitting(arguments, stage)
    settle_on_cpu(arguments)
    if arguments.use_cpu:
        _require_no_gpu(arguments)
    if arguments.ddp_backend and _started() == 1:
        raise UserError(
            f"ddp_backend={arguments.ddp_backend} needs several processes: start with torchrun, or leave it out"
        )
    with _in_one_sentence(arguments), warnings.catch_warnings():
        # The older name is the one that every supported release has, and the ready configurations use.
        warnings.filterwarnings("ignore", "`gradient_checkpointing", FutureWarning)
        transformers_own()
    require_joined(arguments)
    _require_one_exchange(arguments)
    _require_whole_batches(arguments)
    _require_reporting(arguments)
    _require_compiler(arguments)
    _require_optimizer(arguments)
    _require_schedule(arguments)


def judge(arguments: TrainingArguments, stage: str) -> None:
    """Refuse, or warn of, each of transformers' settings that has another value than the stage's default.

    Raises:
        UserError: the stage does not do what a setting asks for.
    """
    own = {item.name: item for item in dataclasses.fields(arguments)}
    for name in (item.name for item in dataclasses.fields(TrainingArguments) if item.init):
        value = getattr(arguments, name)
        if _is_default(value, own[name]):
            continue
        verdict = VERDICTS[name][stage] if name in VERDICTS else None
        if verdict is None:
            _warn(f"{name}={value} is passed on to transformers as it is: it was not tried in {stage}")
        elif verdict.kind is Kind.REFUSED and value not in verdict.passes:
            raise UserError(f"{name}={value} is refused in {stage}: {verdict.note}")
        elif verdict.kind is Kind.NO_EFFECT:
            _warn(f"{name}={_shown(name, value)} does nothing in {stage}: {verdict.note}")
        elif not _has_what_it_needs(arguments, verdict):
            _warn(f"{name}={value} does nothing without {' or '.join(verdict.needs)}")


def tell_of_warmup(arguments: TrainingArguments, steps: int) -> None:
    """Warn where a run of so many steps ends before its learning rate was as large as was asked for."""
    warmup = arguments.get_warmup_steps(steps)
    if warmup >= steps > 0 and arguments.lr_scheduler_type not in _WITHOUT_WARMUP and not arguments.process_index:
        logger.warning(
            "warmup_steps=%g outlives this run of %d steps: the learning rate rises to %.0f %% of learning_rate=%g; "
            "give a share of the run, such as 0.1", arguments.warmup_steps, steps, 100 * (steps - 1) / warmup,
            arguments.learning_rate,
        )  # fmt: skip


def default_of(item: dataclasses.Field[Any]) -> Any:
    """A setting's default."""
    return item.default_factory() if item.default_factory is not dataclasses.MISSING else item.default


def equals_default(value: Any, default: Any) -> bool:
    """Whether a setting has its default, of which transformers may have made an object."""
    if default is None and hasattr(value, "to_dict"):
        default = type(value)()
    return bool(value == default)


def _is_default(value: Any, item: dataclasses.Field[Any]) -> bool:
    """Whether a setting asks for what its default does."""
    default = default_of(item)
    if default == "no" and value is False:  # what HfArgumentParser makes of a "no" where true and false are taken, too
        return True
    return equals_default(value, default) or (default is None and not value)


def _shown(name: str, value: Any) -> Any:
    return "…" if name.endswith("_token") else value


def _has_what_it_needs(arguments: TrainingArguments, verdict: Verdict) -> bool:
    values = [getattr(arguments, name, None) for name in verdict.needs]
    return not values or any(x and getattr(x, "value", x) not in ("no", "none", ["none"]) for x in values)


def _warn(message: str) -> None:
    """In the first process alone."""
    if os.environ.get("RANK", "0") == "0":
        logger.warning(message)


@contextmanager
def _in_one_sentence(arguments: TrainingArguments, *names: str) -> Iterator[None]:
    """Tell what transformers, accelerate or torch refuse of the settings of these names as an error of the user's."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of any class: it is about settings alone
        values = {name: getattr(arguments, name) for name in names}
        given = " ".join(f"{name}={getattr(value, 'value', value)}" for name, value in values.items() if value)
        said = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{given} cannot be used: {said}" if given else said) from error


def require_usable_run(arguments: TrainingArguments) -> None:
    """What transformers' own settings can be; it would train nothing, or fail far from here.

    Raises:
        UserError: one is out of range.
    """
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        require_positive(name, getattr(arguments, name))
    if arguments.max_steps != -1:
        require_positive("max_steps", arguments.max_steps)
    elif not 0 < arguments.num_train_epochs < math.inf:
        raise UserError(f"num_train_epochs={arguments.num_train_epochs} is not positive: give the rounds to train")
    if not arguments.learning_rate >= 0:  # NaN, too
        raise UserError(f"learning_rate={arguments.learning_rate} is not a rate: give a number from 0")
    for name in ("seed", "data_seed"):
        if not 0 <= (getattr(arguments, name) or 0) < 2**32:
            raise UserError(f"{name}={getattr(arguments, name)} is not a seed: give a number from 0 to below 2**32")


def _require_fitting(arguments: TrainingArguments, stage: str) -> None:
    """What one setting needs of another, where transformers would fail in the middle of the run."""
    best = str(getattr(arguments.save_strategy, "value", arguments.save_strategy)) == "best"
    evaluates = str(getattr(arguments.eval_strategy, "value", arguments.eval_strategy)) != "no"
    wants = {"eval_strategy": evaluates, "eval_on_start": arguments.eval_on_start}
    wants |= {"load_best_model_at_end": arguments.load_best_model_at_end, "save_strategy": best}
    for name, wanted in wants.items():
        value = getattr(arguments, name)
        if wanted and not arguments.validation_file:
            raise UserError(f"{name}={getattr(value, 'value', value)} needs validation_file: name what to evaluate on")
    if best and not evaluates:
        raise UserError("save_strategy=best needs evaluations to choose by: give eval_strategy, too")
    metric = arguments.metric_for_best_model
    if best and metric is None:
        raise UserError("save_strategy=best needs metric_for_best_model: give one of " + ", ".join(METRICS[stage]))
    if metric is not None and metric.removeprefix("eval_") not in (*METRICS[stage], *_RUNTIME_METRICS):
        raise UserError(
            f"metric_for_best_model={metric} is nothing that {stage} evaluates: give one of {', '.join(METRICS[stage])}"
        )
    for name in _OF_WORKERS if not arguments.dataloader_num_workers else ():
        if getattr(arguments, name, None):
            raise UserError(f"{name}={getattr(arguments, name)} needs workers: give dataloader_num_workers, too")


def _require_no_gpu(arguments: TrainingArguments) -> None:
    for name, instead in (("fp16", "bf16"), ("fp16_full_eval", "bf16_full_eval")):
        if getattr(arguments, name):
            raise UserError(f"{name}=True needs a GPU and this run is on the CPU: give {instead}, or leave it out")
    for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
        given = getattr(arguments, name, None)
        if given and "offload" in given:  # in a dict or in JSON
            raise UserError(f"{name}={given} needs a GPU to offload from and this run is on the CPU: leave offload out")


def _require_one_exchange(arguments: TrainingArguments) -> None:
    """Reentrant checkpointing runs a backward pass inside the backward pass, at whose end processes take gradients for
    complete: with each piece of a batch, or, where unused parameters are looked for, with each layer."""
    given = {**(arguments.gradient_checkpointing_kwargs or {})}
    options = {name: value for name, value in given.items() if name not in ("every_n_layers", "offload")}
    reentrant = options and options.get("use_reentrant") in (None, True)  # None is True to torch, nothing is not
    if arguments.world_size == 1 or not (arguments.gradient_checkpointing and reentrant):
        return
    for name in ("token_budget", "ddp_find_unused_parameters"):
        if getattr(arguments, name, None):
            told = " (accumulated batches set one)" if name == "token_budget" else ""
            raise UserError(
                f"gradient_checkpointing_kwargs={given} is reentrant, which does not go with "
                f"{name}={getattr(arguments, name)}{told} over several processes: give use_reentrant=False"
            )


def _require_whole_batches(arguments: TrainingArguments) -> None:
    given = arguments.accelerator_config
    for name, fine in _CHANGE_BATCHES.items():
        if getattr(given, name) not in fine:
            raise UserError(
                f"accelerator_config has {name}={getattr(given, name)}, which changes batches: leave it out"
            )
    steps = (given.gradient_accumulation_kwargs or {}).get("num_steps", 1)  # transformers writes its own there
    if steps != 1:
        raise UserError("accelerator_config has num_steps: give gradient_accumulation_steps instead")


def _require_reporting(arguments: TrainingArguments) -> None:
    from transformers.integrations import get_reporting_integration_callbacks

    with _in_one_sentence(arguments, "report_to"):
        for callback in get_reporting_integration_callbacks(arguments.report_to):
            callback()  # which looks for its package, and no more


def _require_compiler(arguments: TrainingArguments) -> None:
    with _in_one_sentence(arguments, "torch_compile_backend", "torch_compile_mode"):
        if arguments.torch_compile:
            TorchDynamoPlugin(backend=arguments.torch_compile_backend, mode=arguments.torch_compile_mode)


def _require_optimizer(arguments: TrainingArguments) -> None:
    """That its package is there; and tell of settings that it does not read."""
    with _in_one_sentence(arguments, "optim", "optim_args", "optim_target_modules"):
        found = _optimizer(arguments)
    if found is None:
        return
    fields = {item.name: item for item in dataclasses.fields(arguments)}
    for name in _OF_OPTIMIZERS:
        value = getattr(arguments, name)
        if _is_default(value, fields[name]):
            continue
        setattr(arguments, name, fields[name].default)
        without = _optimizer(arguments)
        setattr(arguments, name, value)
        if without == found:
            _warn(f"{name}={value} does nothing: optim={arguments.optim.value} does not read it")


def _optimizer(arguments: TrainingArguments) -> tuple[Any, Any] | None:
    """The optimizer's class and keywords; None for one that wants to see the model."""
    from transformers import Trainer

    try:
        return Trainer.get_optimizer_cls_and_kwargs(arguments, _NoModel())
    except _ModelNeededError:
        return None


class _ModelNeededError(Exception):
    pass


class _NoModel:
    def __getattr__(self, name: str) -> Any:
        raise _ModelNeededError


def _require_schedule(arguments: TrainingArguments) -> None:
    """That transformers makes it of its keywords; and tell of settings that it does not read."""
    from transformers.optimization import get_scheduler

    kind, steps = arguments.lr_scheduler_type.value, max(arguments.max_steps, 1)
    with _in_one_sentence(arguments, "lr_scheduler_type", "lr_scheduler_kwargs"):
        get_scheduler(
            kind, torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3), arguments.get_warmup_steps(steps),
            steps, scheduler_specific_kwargs=dict(arguments.lr_scheduler_kwargs or {}),
        )  # fmt: skip
    fields = {item.name: item for item in dataclasses.fields(arguments)}
    for name, unread in (("warmup_steps", _WITHOUT_WARMUP), ("lr_scheduler_kwargs", _WITHOUT_KWARGS)):
        value = getattr(arguments, name)
        if kind in unread and value and not _is_default(value, fields[name]):
            _warn(f"{name}={value} does nothing: lr_scheduler_type={kind} does not read it")


def settle_on_cpu(arguments: TrainingArguments) -> None:
    """Where there is no accelerator, ask for the CPU: only then does accelerate join the processes of a launcher.

    What is set here is kept by name in ``settled``: it is this machine's, and not the run's.
    """
    before = arguments.use_cpu, arguments.dataloader_pin_memory
    arguments.use_cpu = arguments.use_cpu or best_device().type == "cpu"
    arguments.dataloader_pin_memory = arguments.dataloader_pin_memory and not arguments.use_cpu
    now = {"use_cpu": arguments.use_cpu, "dataloader_pin_memory": arguments.dataloader_pin_memory}
    arguments.settled = [name for (name, value), old in zip(now.items(), before, strict=True) if value != old]


def _started() -> int:
    """Processes that a launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def require_joined(arguments: TrainingArguments) -> None:
    """Refuse processes that would each train alone, into the same folder."""
    if _started() != arguments.world_size:
        raise UserError(
            f"{_started()} processes were started and {arguments.world_size} would train together on "
            f"{arguments.device}: give --use_cpu true, or start one"
        )


def require_output(arguments: TrainingArguments) -> None:
    """transformers would take a folder of its own."""
    if not arguments.output_dir:
        raise UserError("output_dir is not given: name the folder for what comes out")


def require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a value that is none of the choices."""
    if value not in choices:
        raise UserError(f"{name}={value} is unknown: choose one of {', '.join(choices)}")


def require_positive(name: str, value: int | None) -> None:
    """None passes: it is what a setting that is left out is."""
    if value is not None and value < 1:
        raise UserError(f"{name}={value} is not positive: give at least 1, or leave it out")


def require_share(name: str, value: float) -> None:
    """Refuse what is not from 0 to below 1."""
    if not 0 <= value < 1:
        raise UserError(f"{name}={value} is not a share: give a number from 0 to below 1")
