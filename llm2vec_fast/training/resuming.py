"""What a run goes on from: the last checkpoint in its output folder, if that is of the same run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from llm2vec_fast.adapters import adapter_source
from llm2vec_fast.data.inputs import find_inputs, printable
from llm2vec_fast.errors import UserError
from llm2vec_fast.jobs.files import replace_json, sha256_of
from llm2vec_fast.loading import ADAPTER_WEIGHTS
from llm2vec_fast.training.checkpoints import checkpoints_in, damage_of, lack_of, ranks_of, set_aside, was_finished

logger = logging.getLogger(__name__)

RUN_FILE = "run.json"  # of which run the output folder is
# Of transformers' settings those that decide the weights, but for how long and at which rate training goes on.
_DECISIVE = (
    "adam_beta1", "adam_beta2", "adam_epsilon", "average_tokens_across_devices", "bf16", "data_seed",
    "dataloader_drop_last", "fp16", "label_smoothing_factor", "lr_scheduler_kwargs", "lr_scheduler_type",
    "max_grad_norm", "neftune_noise_alpha", "optim", "optim_args", "optim_target_modules", "seed",
    "train_sampling_strategy", "warmup_ratio", "warmup_steps", "weight_decay",
)  # fmt: skip
# Of ours those that do not, or that a restart may have reason to change.
_FREE = {
    "features_folder", "saved_rank", "test_file", "token_budget", "validation_document_instruction", "validation_file",
    "validation_query_instruction",
}  # fmt: skip
_MODEL_FILES = ("*.safetensors", "*.bin", "config.json", "tokenizer.json")
_SAMPLES, _SAMPLE = 64, 1 << 18  # how many of a file, and the bytes of each
_RESULTS = (ADAPTER_WEIGHTS, "model*.safetensors", "head.safetensors")


def checkpoint_to_resume(arguments: TrainingArguments) -> str | None:
    """The checkpoint to go on from, or None to begin; from now on the output folder is this run's.

    The first process chooses, for all of them. What it passes over, and what is later than its choice, is renamed.

    Args:
        arguments: of a stage. ``resume_from_checkpoint`` names a checkpoint of any run.

    Raises:
        UserError: the output folder is a model or an adapter that training starts from, or another run's; or the
            checkpoint named is not whole; or there are checkpoints and none of them is.
    """
    chosen: list[Any] = [None, None]
    if arguments.process_index == 0:
        try:
            chosen[0] = _chosen(arguments)
        except UserError as error:
            chosen[1] = error
    if dist.is_initialized():  # alone, each would choose by what its machine has
        dist.broadcast_object_list(chosen)
    if chosen[1] is not None:
        raise chosen[1]
    if chosen[0] is not None and (fault := damage_of(Path(chosen[0]), read=False)):
        raise UserError(f"{chosen[0]} is not the same on every machine, {fault}: give a folder that all of them share")
    return chosen[0]


def _chosen(arguments: TrainingArguments) -> str | None:
    folder, named = Path(arguments.output_dir), arguments.resume_from_checkpoint
    _refuse_inputs(folder, arguments)
    asked = _settings(arguments)
    if named is not None:
        last, faults = Path(str(named)), {}
        if fault := _fault(last, arguments):
            raise UserError(
                f"resume_from_checkpoint={named} is no whole checkpoint, {fault}: name another checkpoint-N folder of "
                "a run"
            )
    else:
        last, faults = _newest_whole(folder, arguments)
        _refuse_other_run(folder, asked, last)
        if last is None:
            _refuse_to_begin_over(folder, faults)
    _pass_over(folder, last, faults)
    folder.mkdir(parents=True, exist_ok=True)
    replace_json(folder / RUN_FILE, asked)
    if last is not None and ranks_of(last) not in (0, arguments.world_size):
        logger.warning(
            "%d processes wrote %s and %d go on: its weights, optimizer and schedule are taken, but what is drawn at "
            "random, such as dropout, is not what it would have been", ranks_of(last), last, arguments.world_size,
        )  # fmt: skip
    if arguments.save_only_model:
        logger.warning(
            "save_only_model=True saves weights alone: no checkpoint of this run can be gone on from, so if it is "
            "interrupted its steps are lost; leave it out to be able to"
        )
    return None if last is None else str(last)


def _newest_whole(folder: Path, arguments: TrainingArguments) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint that training can go on from, and what is wrong with those after it."""
    faults: dict[Path, str] = {}
    for path in checkpoints_in(folder):
        fault = _fault(path, arguments)
        if fault is None:
            return path, faults
        faults[path] = fault
    return None, faults


def _fault(checkpoint: Path, arguments: TrainingArguments) -> str | None:
    """Why training cannot go on from a checkpoint as if nothing had interrupted it, or None."""
    fault = damage_of(checkpoint) or (_fault_of_best(checkpoint) if arguments.load_best_model_at_end else None)
    if fault is not None or (is_done(arguments, str(checkpoint)) and not is_sharded(arguments)):
        return fault  # of the last step nothing but the weights is needed
    return lack_of(checkpoint)


def _fault_of_best(checkpoint: Path) -> str | None:
    best = _state_of(checkpoint).best_model_checkpoint
    fault = damage_of(Path(best)) if best else None
    return fault and f"its best checkpoint {best} cannot be loaded at the end ({fault}; load_best_model_at_end=False)"


def _refuse_to_begin_over(folder: Path, faults: Mapping[Path, str]) -> None:
    """Where checkpoints were finished, and then damaged or without what training goes on from."""
    told = [f"{path.name}: {fault}" for path, fault in faults.items() if was_finished(path)]
    if told:
        adapter = any((path / ADAPTER_WEIGHTS).exists() for path in faults)
        last_in = ", or put one last in peft_model_name_or_path, with continue_adapter=True and another output_dir"
        raise UserError(
            f"{folder} has checkpoints and training can go on from none of them ({'; '.join(told)}): remove them to "
            f"begin anew{last_in if adapter else ''}"
        )


def _pass_over(folder: Path, last: Path | None, faults: Mapping[Path, str]) -> None:
    """Take what is not gone on from out of the way of later checkpoints, and say so."""
    step = 0 if last is None else _state_of(last).global_step
    for path in checkpoints_in(folder):
        if int(path.name.rsplit("-", 1)[1]) < step or (last is not None and path.resolve() == last.resolve()):
            continue
        place = set_aside(path)
        fault = faults.get(path, f"it is later than {last}")
        logger.warning("%s is passed over, %s; it is now %s", path, fault, place.name if place else "removed")


def is_done(arguments: TrainingArguments, checkpoint: str) -> bool:
    """Whether a checkpoint is of the last step that is asked for, or a later one."""
    state = _state_of(Path(checkpoint))
    if arguments.max_steps > 0:
        return state.global_step >= arguments.max_steps
    return round(state.epoch or 0, 6) >= arguments.num_train_epochs


def is_sharded(arguments: TrainingArguments) -> bool:
    """Whether checkpoints hold weights in parts, which load into what trains only."""
    return bool(arguments.fsdp or arguments.deepspeed)


def _state_of(checkpoint: Path) -> TrainerState:
    return TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))


def _refuse_inputs(folder: Path, arguments: TrainingArguments) -> None:
    for name in ("model_name_or_path", "peft_model_name_or_path"):
        for given in _several(getattr(arguments, name)):
            source = Path(adapter_source(given))
            if source.exists() and source.resolve() == folder.resolve():
                raise UserError(f"output_dir={folder} is {name}, too, and would be overwritten: give another folder")


def _refuse_other_run(folder: Path, asked: dict[str, Any], last: Path | None) -> None:
    left = [last] if last else [path for pattern in _RESULTS for path in sorted(folder.glob(pattern))]
    if not left:
        return
    try:
        before = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        changes = ["nothing tells which"]
    else:
        names = [*asked, *(name for name in before if name not in asked)]
        names = ["stage"] if before.get("stage") != asked["stage"] else names  # all else differs, too
        changes = [f"{x} {before.get(x)} -> {asked.get(x)}" for x in names if before.get(x) != asked.get(x)]
    if changes:
        again = f"; --resume_from_checkpoint {last} goes on from it all the same" if last else ""
        raise UserError(
            f"{folder} has {left[0].name} of a run with other settings ({', '.join(changes)}): give these, or another "
            f"output_dir{again}"
        )


def _settings(arguments: TrainingArguments) -> dict[str, Any]:
    """What decides the weights, as JSON has it; files, models and adapters by their contents."""
    stock = {item.name for item in dataclasses.fields(TrainingArguments)}
    own = [item.name for item in dataclasses.fields(arguments) if item.name not in stock | _FREE]
    batch = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    settings = {"stage": arguments.STAGE, "sequences_of_a_step": batch}
    settings |= {name: getattr(arguments, name, None) for name in (*own, *_DECISIVE)}
    files = [path for x in arguments.train_file for path in _files(x, Path(arguments.output_dir))]
    settings["train_file"] = [
        f"{printable(path.name)} of {path.stat().st_size:,} bytes{_digest(path)}" for path in files
    ]
    settings["model_name_or_path"] = _model(str(arguments.model_name_or_path))
    settings["peft_model_name_or_path"] = list(map(_adapter, _several(arguments.peft_model_name_or_path)))
    return json.loads(json.dumps(settings, default=lambda x: getattr(x, "value", None) or str(x)))


def _files(entry: str, folder: Path) -> list[Path]:
    """A file, or those of a folder or glob."""
    file = Path(os.path.expanduser(entry))
    return [file] if file.is_file() else [Path(found.path) for found in find_inputs([entry], [folder])]


def _several(given: str | list[str] | None) -> Iterator[str]:
    yield from [given] if isinstance(given, str) else given or []


def _adapter(given: str) -> str:
    weights = Path(adapter_source(given)) / ADAPTER_WEIGHTS
    return f"{given}{_digest(weights)}" if weights.is_file() else given


def _model(given: str) -> str:
    """A local model by samples of its files: weights that were trained anew differ in all of them."""
    path = Path(given).expanduser()
    files = [path] if path.is_file() else sorted(found for name in _MODEL_FILES for found in path.glob(name))
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with open(file, "rb") as weights:
            for place in range(0, size, max(_SAMPLE, size // _SAMPLES)):
                weights.seek(place)
                digest.update(weights.read(_SAMPLE))
    return f"{given} with samples of SHA-256 {digest.hexdigest()[:12]}" if files else given


def _digest(path: Path) -> str:
    return f" with SHA-256 {sha256_of(path)[:12]}"
