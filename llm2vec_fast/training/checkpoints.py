"""Checkpoints that are whole or not there: what a full disk or a killed process left is never trained on from."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from llm2vec_fast.errors import UserError

_UNWRITABLE = {errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOSPC, errno.EPERM, errno.EROFS}
# safetensors and torch wrap the system's own error; torch's is a RuntimeError that names a file of its source.
_WRAPPED = {SafetensorError: "while serializing", RuntimeError: "inline_container"}
_TORCH_READER = "PytorchStreamReader"  # of the same file


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint in a folder that is whole; its state is what a checkpoint is completed by."""
    found = {}
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if step.isdigit() and is_whole(path):
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
    except (OSError, *_WRAPPED) as error:
        if not _is_of_writing(error):
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
    except (OSError, *_WRAPPED) as error:
        if not _is_of_writing(error):
            raise
        raise UserError(
            f"{folder} cannot be written: {reason_of(error)}; make room and start again, training goes on from the "
            "last checkpoint"
        ) from error


def reason_of(error: BaseException) -> str:
    """Why writing failed, in a line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:200]


def is_whole(checkpoint: Path) -> bool:
    """Whether a folder is a checkpoint with its state, and weights that can be read."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        for weights in checkpoint.glob("*.safetensors"):
            with safe_open(weights, framework="pt"):  # compares the file's length with what its header says
                pass
    except (OSError, ValueError, SafetensorError):
        return False
    return True


def _is_of_writing(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno in _UNWRITABLE
    told = str(error)
    return _TORCH_READER not in told and any(isinstance(error, kind) and x in told for kind, x in _WRAPPED.items())
