"""What a run goes on from: the last checkpoint in its output folder, if that is of the same run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from llm2vec_fast.adapters import adapter_source
from llm2vec_fast.data.inputs import find_inputs, printable
from llm2vec_fast.errors import UserError
from llm2vec_fast.loading import ADAPTER_WEIGHTS
from llm2vec_fast.saving import write_json
from llm2vec_fast.training.checkpoints import is_whole, last_checkpoint

RUN_FILE = "run.json"  # of which run the output folder is
# Of transformers' settings those that decide the weights, but for how long and at which rate training goes on.
_DECISIVE = (
    "adam_beta1", "adam_beta2", "adam_epsilon", "bf16", "data_seed", "fp16", "label_smoothing_factor",
    "lr_scheduler_kwargs", "lr_scheduler_type", "max_grad_norm", "neftune_noise_alpha", "optim", "optim_args", "seed",
    "warmup_ratio", "warmup_steps", "weight_decay",
)  # fmt: skip
# Of ours those that do not, or that a restart may have reason to change.
_FREE = {
    "features_folder", "saved_rank", "test_file", "token_budget", "validation_document_instruction", "validation_file",
    "validation_query_instruction",
}  # fmt: skip
_RESULTS = (ADAPTER_WEIGHTS, "model*.safetensors", "head.safetensors")


def checkpoint_to_resume(arguments: TrainingArguments) -> str | None:
    """The checkpoint to go on from, or None to begin; from now on the output folder is this run's.

    Args:
        arguments: of a stage. ``resume_from_checkpoint`` names a checkpoint of any run.

    Raises:
        UserError: the output folder is a model or an adapter that training starts from, or another run's; or the
            checkpoint named is none.
    """
    folder = Path(arguments.output_dir)
    _refuse_inputs(folder, arguments)
    named = arguments.resume_from_checkpoint
    if named is not None and not is_whole(Path(named)):
        raise UserError(f"resume_from_checkpoint={named} is no whole checkpoint: name a checkpoint-N folder of a run")
    last = named or last_checkpoint(folder)
    if arguments.process_index == 0:  # the first process writes; where it refuses, its launcher ends the others
        asked = _settings(arguments)
        if named is None:
            _refuse_other_run(folder, asked, last)
        _write(folder, asked)
    return last


def is_done(arguments: TrainingArguments, checkpoint: str) -> bool:
    """Whether a checkpoint is of the last step that is asked for, or a later one."""
    state = TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME)))
    if arguments.max_steps > 0:
        return state.global_step >= arguments.max_steps
    return round(state.epoch or 0, 6) >= arguments.num_train_epochs


def _refuse_inputs(folder: Path, arguments: TrainingArguments) -> None:
    for name in ("model_name_or_path", "peft_model_name_or_path"):
        for given in _several(getattr(arguments, name)):
            source = Path(adapter_source(given))
            if source.exists() and source.resolve() == folder.resolve():
                raise UserError(f"output_dir={folder} is {name}, too, and would be overwritten: give another folder")


def _refuse_other_run(folder: Path, asked: dict[str, Any], last: str | None) -> None:
    left = [Path(last)] if last else [path for pattern in _RESULTS for path in sorted(folder.glob(pattern))]
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
    """What decides the weights, as JSON has it; of training files their names and sizes, of adapters their contents."""
    stock = {item.name for item in dataclasses.fields(TrainingArguments)}
    own = [item.name for item in dataclasses.fields(arguments) if item.name not in stock | _FREE]
    batch = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    settings = {"stage": arguments.STAGE, "sequences_of_a_step": batch}
    settings |= {name: getattr(arguments, name, None) for name in (*own, *_DECISIVE)}
    files = [path for x in arguments.train_file for path in _files(x, Path(arguments.output_dir))]
    settings["train_file"] = [f"{printable(path.name)} of {path.stat().st_size:,} bytes" for path in files]
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
    return (
        f"{given} with SHA-256 {hashlib.sha256(weights.read_bytes()).hexdigest()[:12]}" if weights.is_file() else given
    )


def _write(folder: Path, settings: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / f"{RUN_FILE}.tmp"
    write_json(beside, settings)
    beside.replace(folder / RUN_FILE)
