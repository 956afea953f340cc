"""Which files a bulk job reads, in which order, and under which names."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from llm2vec_fast.errors import InputError

COMPRESSIONS = (".gz", ".bz2", ".xz")
FORMATS = {
    ".txt": "txt",
    ".text": "txt",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
}
KNOWN = f"{', '.join(FORMATS)} (text formats also with {', '.join(COMPRESSIONS)})"


@dataclass(frozen=True)
class InputFile:
    """One file of the corpus as it was when the job began.

    ``name`` is the path below the folder that all inputs share: the same from whatever folder the command is run.
    ``bytes`` is the size on disk, ``modified_ns`` the modification time in nanoseconds since 1970.
    """

    name: str
    path: str
    format: str
    bytes: int
    modified_ns: int

    @property
    def compression(self) -> str:
        """The compression's suffix (".gz", …), or an empty string."""
        suffix = Path(self.path).suffix.lower()
        return suffix if suffix in COMPRESSIONS else ""


def find_inputs(patterns: Sequence[str], exclude: Path) -> list[InputFile]:
    """Expand files, folders (searched recursively, hidden names skipped) and globs, in a reproducible order.

    Arguments keep their order, what a folder or glob yields is sorted, and a file met twice is read once. Nothing
    below ``exclude`` (the output folder) is taken from a folder or a glob.

    Raises:
        InputError: nothing matches, or a file is of an unknown format or unreadable.
    """
    excluded = exclude.resolve()
    paths: dict[Path, None] = {}
    for pattern in patterns:
        for path in _expand(pattern, excluded):
            paths.setdefault(Path(os.path.abspath(path)))  # links stay: a link's target may have no suffix
    names = _short_names(list(paths))
    return [_describe(path, name) for path, name in zip(paths, names, strict=True)]


def format_of(path: Path) -> str | None:
    """The format that the file's name tells, None where it tells none."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compressed = bool(suffixes) and suffixes[-1] in COMPRESSIONS
    if compressed:
        suffixes.pop()
    kind = FORMATS.get(suffixes[-1]) if suffixes else None
    return None if compressed and kind == "parquet" else kind


def _expand(pattern: str, excluded: Path) -> Iterable[Path]:
    path = Path(pattern)
    if path.is_dir():
        return _walk(path, excluded)
    if path.exists():
        if format_of(path) is None:
            raise InputError(f"{path} is of a format that its name does not tell: rename it to end in one of {KNOWN}")
        return [path]
    if not glob.has_magic(pattern):
        raise InputError(f"input {pattern} does not exist: give a file, a folder or a quoted glob")
    return _match(pattern, excluded)


def _walk(folder: Path, excluded: Path) -> list[Path]:
    found: list[Path] = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = [Path(parent) / name for name in files if not name.startswith(".")]
        found += [path for path in paths if format_of(path) and not _below(path, excluded)]
    if not found:
        raise InputError(f"folder {folder} holds no file to embed: expected names that end in one of {KNOWN}")
    return sorted(found)


def _match(pattern: str, excluded: Path) -> list[Path]:
    paths = [Path(match) for match in sorted(glob.glob(pattern, recursive=True))]
    found = [path for path in paths if path.is_file() and format_of(path) and not _below(path, excluded)]
    if not found:
        raise InputError(f"the glob {pattern} matches no file to embed: expected names that end in one of {KNOWN}")
    return found


def _below(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder)


def _short_names(paths: Sequence[Path]) -> list[str]:
    shared = Path(os.path.commonpath([path.parent for path in paths]))
    return [path.relative_to(shared).as_posix() for path in paths]


def _describe(path: Path, name: str) -> InputFile:
    kind = format_of(path)
    assert kind is not None, path
    try:
        with open(path, "rb"):
            status = path.stat()
    except OSError as error:
        raise InputError(f"input {path} cannot be read: {error.strerror}") from error
    return InputFile(name, str(path), kind, status.st_size, status.st_mtime_ns)
