"""Files that are either whole or not there, whatever happens to the process or the machine."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from llm2vec_fast.errors import OutputError

CHUNK_BYTES = 4 << 20
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Write beside ``path`` and rename once it is on the disk; on any error ``path`` stays as it was.

    Raises:
        OutputError: the disk is full, or the folder cannot be written.
    """
    beside = path.with_name(path.name + ".tmp")
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        sync_folder(path.parent)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise writing_error(path, error) from error
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def replace_json(path: Path, value: Any) -> None:
    """Write ``value`` as readable JSON, whole or not at all."""
    with replacing(path) as file:
        file.write(json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n")


def append_lines(path: Path, lines: list[str]) -> None:
    """Append lines and wait until they are on the disk. A process that dies meanwhile leaves a torn last line.

    Raises:
        OutputError: the disk is full, or the file cannot be written.
    """
    try:
        with open(path, "ab") as file:
            file.write("".join(f"{line}\n" for line in lines).encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise writing_error(path, error) from error


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file that `append_lines` wrote, without a torn line; nothing where there is no file."""
    if not path.exists():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue


def sha256_of(path: Path) -> str:
    """The file's SHA-256 in hexadecimal, read in chunks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Make renames in ``folder`` survive a power cut, where the system can."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def writing_error(path: Path, error: OSError) -> OutputError:
    """The sentence for a write that failed."""
    if error.errno in NO_SPACE:
        free = shutil.disk_usage(path.parent).free / 1e9
        return OutputError(
            f"no space left to write {path.name} in {path.parent} ({free:.1f} GB free): make room or raise the limit; "
            "finished parts are kept and the same command goes on"
        )
    return OutputError(f"{path} cannot be written: {error.strerror or error}; finished parts are kept")
