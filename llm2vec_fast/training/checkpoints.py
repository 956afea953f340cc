"""Checkpoints that are whole or not there: what a full disk or a killed process left is never trained on from."""

from __future__ import annotations

import errno
import json
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from itertools import count
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

from safetensors import SafetensorError, safe_open
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from llm2vec_fast.errors import UserError
from llm2vec_fast.jobs.files import CHUNK_BYTES, sync_file, sync_folder

CONTENTS = "contents.json"  # the size and CRC-32 of each file of a checkpoint, on the disk before its state
# What training goes on from, in the layouts of transformers, of FSDP (full and sharded) and of DeepSpeed.
_WEIGHTS = ("adapter_model.*", "model*.safetensors", "pytorch_model*", "global_step*")
_STATES = {
    "optimizer state": ("optimizer*", "global_step*"),
    "state of the learning rate": ("scheduler.pt", "global_step*"),
    "state of the random numbers": ("rng_state*.pth",),
}
_UNWRITABLE = {errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOSPC, errno.EPERM, errno.EROFS}
# safetensors and torch wrap the system's own error; torch's is a RuntimeError that names a file of its source.
_WRAPPED = {SafetensorError: "while serializing", RuntimeError: "inline_container"}
_TORCH_READER = "PytorchStreamReader"  # of the same file


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in a folder, whole or not, the newest first."""
    found = {path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-"): path for path in folder.glob("checkpoint-*")}
    return [found[step] for step in sorted(filter(str.isdecimal, found), key=int, reverse=True)]


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint in a folder that is whole, by the sizes of its files."""
    for path in checkpoints_in(folder):
        if damage_of(path, read=False) is None and lack_of(path) is None:
            return str(path)
    return None


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


def damage_of(checkpoint: Path, *, read: bool = True) -> str | None:
    """What is wrong with a checkpoint's state, weights or any other of its files; None where nothing is.

    Each file is compared with `CONTENTS`. A checkpoint without it is of another program, and its files are looked at by
    their format.

    Args:
        read: read files to their end, not just look at their sizes.
    """
    if not checkpoint.is_dir():
        return "there is no such folder"
    files = _files(checkpoint)
    if TRAINER_STATE_NAME not in files:
        return f"it has no {TRAINER_STATE_NAME}"
    try:
        state = TrainerState.load_from_json(str(files[TRAINER_STATE_NAME]))
        listed = json.loads(files[CONTENTS].read_text(encoding="utf-8")) if CONTENTS in files else None
    except (OSError, ValueError, TypeError) as error:
        return f"{TRAINER_STATE_NAME} or {CONTENTS} cannot be read ({reason_of(error)})"
    if not state.global_step:
        return f"{TRAINER_STATE_NAME} tells no global_step"
    if listed is None:
        faults = (_unreadable(path) for path in files.values())
    else:
        faults = (_change(name, files.get(name), was, read) for name, was in listed.items())
    return next(filter(None, faults), None if _has(files, _WEIGHTS) else "it has no weights")


def lack_of(checkpoint: Path) -> str | None:
    """What a checkpoint with weights lacks for training to go on from it as if nothing had interrupted it, or None."""
    files = _files(checkpoint)
    lacking = [name for name, patterns in _STATES.items() if not _has(files, patterns)]
    if len(lacking) == len(_STATES):
        return "it holds weights alone, as save_only_model=True leaves it"
    return f"it has no {', no '.join(lacking)}" if lacking else None


def ranks_of(checkpoint: Path) -> int:
    """How many processes wrote a checkpoint."""
    return sum(fnmatchcase(name, "rng_state*.pth") for name in _files(checkpoint))


def complete(checkpoint: Path, save_state: Callable[[str], None]) -> None:
    """Put the files of a checkpoint on the disk, then a list of them, then its state: whenever power fails, it is whole
    or has no state.

    Args:
        save_state: writes the state to a file of the name given.

    Raises:
        OSError: it cannot be written.
    """
    beside = _beside(checkpoint / TRAINER_STATE_NAME)
    save_state(str(beside))
    files = {name: x for name, x in _files(checkpoint).items() if name not in (CONTENTS, TRAINER_STATE_NAME)}
    files[TRAINER_STATE_NAME] = files.pop(beside.name)
    contents = {name: [path.stat().st_size, _crc(path)] for name, path in sorted(files.items())}
    (checkpoint / CONTENTS).write_text(json.dumps(contents, indent=1), encoding="utf-8")
    for path in [*files.values(), checkpoint / CONTENTS]:
        sync_file(path)
    for folder in {path.parent for path in files.values()} | {checkpoint, checkpoint.parent}:
        sync_folder(folder)
    beside.replace(checkpoint / TRAINER_STATE_NAME)
    sync_folder(checkpoint)


def was_finished(checkpoint: Path) -> bool:
    """Whether writing it came to its end, whatever became of its files since."""
    state = checkpoint / TRAINER_STATE_NAME
    return state.exists() or ((checkpoint / CONTENTS).exists() and not _beside(state).exists())


def set_aside(checkpoint: Path) -> Path | None:
    """Take a checkpoint that training does not go on from out of the way of later ones, under another name.

    One that was cut short while it was written is removed. Returns where it is now.
    """
    if not was_finished(checkpoint):
        shutil.rmtree(checkpoint)
        return None
    places = (checkpoint.with_name(f"passed-over-{number}-{checkpoint.name}") for number in count(1))
    return checkpoint.rename(next(place for place in places if not place.exists()))


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}")


def _files(checkpoint: Path) -> dict[str, Path]:
    """The files of a checkpoint and of its folders; README.md, which anybody may edit, is none of its state."""
    found = {path.relative_to(checkpoint).as_posix(): path for path in checkpoint.rglob("*") if path.is_file()}
    return {name: path for name, path in found.items() if name != "README.md"}


def _has(names: Any, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _change(name: str, path: Path | None, was: list[int], read: bool) -> str | None:
    if path is None:
        return f"{name} is missing"
    size, crc = was
    try:
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes and was written with {size:,}"
        return f"{name} is no longer what was written" if read and _crc(path) != crc else None
    except OSError as error:
        return f"{name} cannot be read ({reason_of(error)})"


def _unreadable(path: Path) -> str | None:
    """What is wrong with a file by its format; nothing of it is unpickled."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):  # compares the file's length with what its header says
                return None
        if path.suffix in (".pt", ".pth", ".bin"):
            with ZipFile(path) as archive:
                damaged = archive.testzip()
                return damaged and f"{path.name} is damaged at {damaged}"
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, BadZipFile, SafetensorError) as error:
        return f"{path.name} cannot be read ({reason_of(error)})"
    return None


def _crc(path: Path) -> int:
    crc = 0
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            crc = zlib.crc32(chunk, crc)
    return crc


def _is_of_writing(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno in _UNWRITABLE
    told = str(error)
    return _TORCH_READER not in told and any(isinstance(error, kind) and x in told for kind, x in _WRAPPED.items())
