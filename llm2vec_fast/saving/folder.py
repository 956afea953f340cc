"""A folder appears or changes whole or not at all, and is on the disk before it takes its place."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llm2vec_fast.errors import OutputError

_AT_FDCWD, _RENAME_EXCHANGE, _RENAME_SWAP = -100, 2, 2
# Read first when a folder is loaded: while they are away, what is there is refused instead of being half of two things.
_READ_FIRST = ("config.json", "adapter_config.json", "head.safetensors")


@contextmanager
def written_beside(target: str | Path, replaces: Sequence[str] = ()) -> Iterator[Path]:
    """A new folder beside ``target`` to write into, put in its place at the end and removed if the body fails.

    The new files are on the disk before they take their place. Where ``target`` exists, its other files come along,
    as links, and the two folders are exchanged in one step where the system can (Linux, macOS), else in two renames. A
    target that cannot be renamed, such as a mounted volume, is changed file by file, in such an order that it does not
    load until it is whole.

    Args:
        target: the folder.
        replaces: patterns of files of ``target`` that do not stay, whether or not there is a new one of that name:
            left from an earlier save they would change what is loaded.

    Raises:
        OutputError: there is a file of the target's name.
        OSError: it cannot be written; then nothing has changed.
    """
    target = Path(target).expanduser().absolute()
    target = target.resolve() if target.is_symlink() else target
    if target.exists() and not target.is_dir():
        raise OutputError(f"{target} is a file: give a folder to save into")
    target.parent.mkdir(parents=True, exist_ok=True)
    _put_back(target)
    beside, inside = _new_folder(target)
    try:
        yield beside
        for path in filter(Path.is_file, beside.rglob("*")):
            path.chmod(0o666 & ~_umask())  # safetensors writes files that nobody else may read
        _sync_all(beside)
        if not target.exists():
            beside.rename(target)
        elif inside or not _exchanged(beside, target, replaces):
            _replace_files(beside, target, replaces)
        _sync(target.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write one JSON object, indented, with a final newline."""
    path.write_text(json.dumps(content, indent=4, ensure_ascii=False) + "\n", encoding="utf-8")


def _new_folder(target: Path) -> tuple[Path, bool]:
    """An empty folder on the file system of ``target``, and whether it had to be inside of it."""
    there = target.is_dir()
    stays = there and (os.path.ismount(target) or _is_around_us(target) or not os.access(target.parent, os.W_OK))
    if stays:
        return Path(tempfile.mkdtemp(prefix=".", suffix=".partial", dir=target)), True
    beside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    beside.chmod(target.stat().st_mode & 0o7777 if there else 0o777 & ~_umask())
    return beside, False


def _is_around_us(target: Path) -> bool:
    """Whether this process works in the folder, which must not be taken away from under it."""
    try:
        place = Path.cwd()
    except OSError:  # it is gone already
        return False
    return any(path.exists() and path.samefile(target) for path in (place, *place.parents))


def _exchanged(beside: Path, target: Path, replaces: Sequence[str]) -> bool:
    """Put ``beside`` in the place of ``target``, with what else ``target`` holds. False where it cannot be renamed."""
    written = {path.name for path in beside.iterdir()}
    _carry(target, beside, written, replaces)
    _sync_all(beside)
    aside = beside.with_name(beside.name.removesuffix(".partial") + ".aside")
    try:
        if not _swapped(beside, target):
            target.rename(aside)
            beside.rename(target)
            aside.rename(beside)
    except OSError as error:
        if error.errno not in (errno.EBUSY, errno.EXDEV, errno.EACCES, errno.EPERM):
            raise
        if aside.exists() and not target.exists():
            aside.rename(target)
        return False
    _carry(beside, target, written, replaces)  # what came while the two were being exchanged
    return True


def _carry(source: Path, target: Path, written: set[str], replaces: Sequence[str]) -> None:
    """Let ``target`` have what else is in ``source``, too: links to the same files, copies where there are no links."""
    old = {path for pattern in replaces for path in source.glob(pattern) if not path.is_dir()}
    for path in source.iterdir():
        place = target / path.name
        if path.name in written or path in old or path.name.endswith(".partial"):
            continue
        if path.is_symlink() or not path.is_dir():
            _link(path, place)
        else:
            place.mkdir(exist_ok=True)
            shutil.copystat(path, place)
            _carry(path, place, set(), ())


def _link(path: Path, place: Path) -> None:
    if os.path.lexists(place):
        return
    try:
        os.link(path, place, follow_symlinks=False)
    except (OSError, NotImplementedError):  # no links there, or not of files of others
        shutil.copy2(path, place, follow_symlinks=False)


def _swapped(one: Path, other: Path) -> bool:
    """Exchange two folders in one step. False where the system or the file system has no such call."""
    names = os.fsencode(one), os.fsencode(other)
    library = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
    if sys.platform == "linux" and hasattr(library, "renameat2"):
        failed = library.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE)
    elif sys.platform == "darwin" and hasattr(library, "renamex_np"):
        failed = library.renamex_np(*names, _RENAME_SWAP)
    else:
        return False
    if failed and ctypes.get_errno() not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(other))
    return not failed


def _replace_files(beside: Path, target: Path, replaces: Sequence[str]) -> None:
    """Put the new files into a folder that cannot be renamed; ``beside`` stays whole until the last is there."""
    written = [path.name for path in beside.iterdir()]
    for name in _READ_FIRST:
        (target / name).unlink(missing_ok=True)
    _sync(target)
    for path in {path for pattern in replaces for path in target.glob(pattern)}:
        if path.is_file() and path.name not in written:
            path.unlink()
    for name in sorted(written, key=lambda name: name in _READ_FIRST):
        place = target / name
        if (beside / name).is_dir():
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(beside / name, place, copy_function=_link)
            continue
        place.unlink(missing_ok=True)
        _link(beside / name, place)
    _sync_all(target)


def _put_back(target: Path) -> None:
    """A save that was cut off between its two renames left the folder aside: it is put back in its place."""
    left = sorted(target.parent.glob(f".{glob.escape(target.name)}.*.aside")) if target.name else []
    if left and not target.exists():
        left[-1].rename(target)


def _sync_all(folder: Path) -> None:
    """Wait until all files of a folder, and their names, are on the disk."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            _sync(path)
    for path in [*filter(Path.is_dir, folder.rglob("*")), folder]:
        _sync(path)


def _sync(path: Path) -> None:
    if path.is_dir() and not hasattr(os, "O_DIRECTORY"):
        return  # Windows cannot
    with contextlib.suppress(PermissionError):  # of files of others that came along
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() or os.name == "posix" else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
