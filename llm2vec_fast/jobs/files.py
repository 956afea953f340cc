"""Files that are either whole or not there, whatever happens to the process or the machine."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, BinaryIO

from llm2vec_fast.errors import OutputError

CHUNK_BYTES = 4 << 20
TEMPORARY = ".{name}.llm2vec-fast.tmp"  # a name that no user's file has; hidden, so that dataset readers pass over it
LEFTOVERS = TEMPORARY.format(name="?*")
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Write beside ``path`` and rename once it is on the disk; on any error ``path`` stays as it was.

    Raises:
        OutputError: the disk is full, or the folder cannot be written.
    """
    beside = path.with_name(TEMPORARY.format(name=path.name))
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


def remove_leftovers(folder: Path) -> None:
    """Remove what a process that died in `replacing` left in ``folder``, every other file stays. Call it with the lock.

    Raises:
        OutputError: the folder cannot be written.
    """
    for path in filter(is_leftover, folder.iterdir()):
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise writing_error(path, error) from error


def remove_own(folder: Path, patterns: Sequence[str]) -> None:
    """Remove a job's own files from its folder, and the folder where nothing else is left: a user's file stays."""
    for pattern in patterns:
        for path in folder.glob(pattern):
            if path.is_file():
                path.unlink(missing_ok=True)
    with suppress(OSError):  # not empty, or not there
        folder.rmdir()


def is_leftover(path: Path) -> bool:
    """Whether it is a file that `replacing` writes before it gets its name."""
    return fnmatchcase(path.name, LEFTOVERS) and path.is_file()


def json_bytes(value: Any, indent: int | None = None) -> bytes:
    """``value`` as JSON in UTF-8, without a line end; half a surrogate pair stays what it is, as an escape."""
    return json.dumps(value, indent=indent, ensure_ascii=False).encode("utf-8", "backslashreplace")


def replace_json(path: Path, value: Any) -> None:
    """Write ``value`` as readable JSON, whole or not at all."""
    with replacing(path) as file:
        file.write(json_bytes(value, indent=1) + b"\n")


def append_lines(path: Path, lines: Sequence[bytes]) -> None:
    """Append lines and wait until they are on the disk. A process that dies meanwhile leaves a torn last line.

    Raises:
        OutputError: the disk is full, or the file cannot be written.
    """
    try:
        with open(path, "ab") as file:
            # A line that was torn before ends here, so that it takes no new one with it.
            begin = b"\n" if file.tell() and not _ends_in_newline(path) else b""
            file.write(begin + b"".join(line + b"\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise writing_error(path, error) from error


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file that `append_lines` wrote, without torn lines; nothing where there is no file."""
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed below
    except FileNotFoundError:  # asked for once: a job that ends may remove it at any moment
        return
    with file:
        for line in file:
            value = json_object(line)
            if value is not None:
                yield value


def json_object(line: bytes) -> dict[str, Any] | None:
    """The JSON object of a line; None where it is torn, or is something else."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def sha256_of(path: Path) -> str:
    """The file's SHA-256 in hexadecimal, read in chunks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def sync_file(path: Path) -> None:
    """Wait until a file that is already written is on the disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames in ``folder`` survive a power cut, where the system can."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _ends_in_newline(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def writing_error(path: Path, error: OSError) -> OutputError:
    """The sentence for a write that failed."""
    if error.errno in NO_SPACE:
        free = shutil.disk_usage(path.parent).free / 1e6
        return OutputError(
            f"no space left to write {path.name} in {path.parent} ({free:,.1f} MB free): make room or raise the limit; "
            "finished parts are kept and the same command goes on"
        )
    return OutputError(f"{path} cannot be written: {error.strerror or error}; finished parts are kept")
