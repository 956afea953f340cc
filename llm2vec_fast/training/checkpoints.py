"""Checkpoints that are whole or not there: what a full disk or a killed process left is never trained on from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from llm2vec_fast.errors import UserError

# safetensors and torch wrap the system's own error; torch's is a RuntimeError that names its writer.
WRITE_ERRORS = (OSError, SafetensorError)
_TORCH_WRITER = "inline_container"


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint in a folder that is whole; its state is what a checkpoint is completed by."""
    found = {}
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if step.isdigit() and _is_whole(path):
            found[int(step)] = str(path)
    return found[max(found)] if found else None


@contextmanager
def whole_or_gone(checkpoint: Path) -> Iterator[None]:
    """While a checkpoint is written: what fails leaves none, and those before it stay.

    Raises:
        UserError: writing failed; the message says why and what to do.
    """
    try:
        yield
    except (*WRITE_ERRORS, RuntimeError) as error:
        if isinstance(error, RuntimeError) and _TORCH_WRITER not in str(error):
            raise
        shutil.rmtree(checkpoint, ignore_errors=True)
        before = last_checkpoint(checkpoint.parent)
        kept = f"goes on from {Path(before).name}" if before else "begins anew, for there is no earlier checkpoint"
        raise UserError(
            f"the checkpoint {checkpoint} cannot be written: {reason_of(error)}; make room, and the same command {kept}"
        ) from error


@contextmanager
def told_if_unwritable(folder: Path) -> Iterator[None]:
    """While a stage runs that writes into ``folder``.

    Raises:
        UserError: it cannot be written; the message says why and what to do.
    """
    try:
        yield
    except WRITE_ERRORS as error:
        raise UserError(
            f"{folder} cannot be written: {reason_of(error)}; make room and start again, training goes on from the "
            "last checkpoint"
        ) from error


def reason_of(error: BaseException) -> str:
    """Why writing failed, in a line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:200]


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
