"""Which files are read, in which order, and under which names; what is passed over is said."""

from __future__ import annotations

import glob
import os
import stat
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llm2vec_fast.data.sniffing import holds_no_rows
from llm2vec_fast.errors import InputError

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
FORMATS = {
    ".txt": "txt",
    ".text": "txt",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
}
KNOWN = f"{', '.join(FORMATS)} (text formats also with {', '.join(COMPRESSIONS)})"
SHOWN_NAMES = 3

Notify = Callable[[str], None]


@dataclass(frozen=True)
class InputFile:
    """One file as it was when the work began.

    ``name`` is the path below the folder that all inputs share, the same from whatever folder the command is run; bytes
    of it that are not UTF-8 are escaped (caf\\xe9.txt), so that it can be written anywhere. ``path`` opens the file.
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

    @property
    def shown(self) -> str:
        """The path as messages show it, on any console."""
        return printable(self.path)


def find_inputs(
    patterns: Sequence[str], exclude: Sequence[Path] = (), notify: Notify = lambda sentence: None
) -> list[InputFile]:
    """Expand files, folders (searched recursively) and globs, ``~`` too, in a reproducible order.

    Arguments keep their order, what a folder or glob yields is sorted, and a path met twice is read once. Links are
    followed, as globs follow them. Nothing of or below ``exclude`` (the output) is taken from a folder or a glob, and
    of a folder no name that begins with a dot or an underscore, as other readers of datasets pass over these.

    Args:
        notify: takes a sentence for each folder or glob of which files are passed over: how many, by ending, and names.

    Raises:
        InputError: nothing matches; a file is of an unknown format, unreadable or no file; or links go round.
    """
    excluded = [path.resolve() for path in exclude]
    paths: dict[Path, None] = {}
    for pattern in patterns:
        for path in _expand(pattern, excluded, notify):
            paths.setdefault(Path(os.path.abspath(path)))  # links stay: a link's target may have no suffix
    names = _short_names(list(paths))
    return [describe(path, name) for path, name in zip(paths, names, strict=True)]


def describe(path: Path, name: str | None = None, kind: str | None = None) -> InputFile:
    """A file as it is now; ``kind`` is its format where its name does not tell.

    Raises:
        InputError: it is no file, or cannot be read.
    """
    kind = kind or format_of(path)
    assert kind is not None, path
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"input {printable(path)} is no file that can be read twice: write it to a file first")
        with open(path, "rb"):
            pass
    except OSError as error:
        raise InputError(f"input {printable(path)} cannot be read: {error.strerror}") from error
    return InputFile(printable(name or path.name), str(path), kind, status.st_size, status.st_mtime_ns)


def format_of(path: Path) -> str | None:
    """The format that the file's name tells, None where it tells none."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compressed = bool(suffixes) and suffixes[-1] in COMPRESSIONS
    if compressed:
        suffixes.pop()
    kind = FORMATS.get(suffixes[-1]) if suffixes else None
    return None if compressed and kind == "parquet" else kind


def printable(path: str | Path) -> str:
    """A path with bytes that are not UTF-8 escaped: caf\\xe9.txt."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


@dataclass
class _PassedOver:
    """What a folder or a glob holds and is not read, by ending."""

    names: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, kind: str, path: str | Path) -> None:
        self.names[kind].append(printable(os.path.basename(path)))

    def tell(self, place: str, notify: Notify) -> None:
        count = sum(map(len, self.names.values()))
        if not count:
            return
        kinds = []
        for kind, names in sorted(self.names.items(), key=lambda item: (-len(item[1]), item[0])):
            more = ", …" if len(names) > SHOWN_NAMES else ""
            kinds.append(f"{len(names):,} {kind} ({', '.join(sorted(names)[:SHOWN_NAMES])}{more})")
        notify(f"{printable(place)}: {count:,} {'is' if count == 1 else 'are'} passed over: {'; '.join(kinds)}")


def _expand(pattern: str, excluded: Sequence[Path], notify: Notify) -> list[Path]:
    path = Path(pattern)
    if not path.exists() and pattern.startswith("~"):
        pattern = os.path.expanduser(pattern)
        path = Path(pattern)
    shown = printable(pattern)
    if path.is_dir():
        return _walk(path, excluded, notify)
    if path.exists():
        if format_of(path) is None:
            raise InputError(f"{shown} is of a format that its name does not tell: rename it to end in one of {KNOWN}")
        return [path]
    if os.path.lexists(pattern):
        raise InputError(
            f"input {shown} is a link to {printable(os.readlink(pattern))}, which does not exist: give the file itself"
        )
    if not glob.has_magic(pattern):
        raise InputError(f"input {shown} does not exist: give a file, a folder or a quoted glob")
    return _match(pattern, excluded, notify)


def _walk(folder: Path, excluded: Sequence[Path], notify: Notify) -> list[Path]:
    passed = _PassedOver()
    found = sorted(_files_below(folder, excluded, (), passed))
    passed.tell(str(folder), notify)
    if not found:
        raise InputError(f"folder {printable(folder)} holds no file to read: expected names that end in one of {KNOWN}")
    return found


def _files_below(folder: Path, excluded: Sequence[Path], above: tuple[str, ...], passed: _PassedOver) -> Iterator[Path]:
    """``above`` holds the real paths of the folders that led here."""
    real = os.path.realpath(folder)
    if real in above:
        raise InputError(f"the link {printable(folder)} leads back to {printable(real)}, round and round: remove it")
    if _is_below(folder, excluded):
        return
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"folder {printable(folder)} cannot be read: {error.strerror}") from error
    for entry in entries:
        path = folder / entry.name
        if entry.name.startswith(".") or _is_below(path, excluded):
            continue
        if entry.name.startswith("_"):
            passed.add("of a name that begins with _", path)
        elif path.is_dir():
            yield from _files_below(path, excluded, (*above, real), passed)
        elif not path.exists():
            passed.add("links to nothing", path)
        elif _is_read(path, passed):
            yield path


def _is_below(path: Path, folders: Sequence[Path]) -> bool:
    return any(path.resolve().is_relative_to(folder) for folder in folders)


def _is_read(path: Path, passed: _PassedOver) -> bool:
    """Whether a file that nobody named by itself is read."""
    kind = format_of(path)
    if kind is None:
        passed.add("".join(path.suffixes[-2:])[-12:] or "without an ending", path)
    elif kind == "json" and holds_no_rows(path):
        passed.add(".json of one object, no rows", path)
        return False
    return kind is not None


def _match(pattern: str, excluded: Sequence[Path], notify: Notify) -> list[Path]:
    found, passed = [], _PassedOver()
    for path in map(Path, sorted(glob.glob(pattern, recursive=True))):
        _refuse_loop(path)
        if _is_below(path, excluded):
            continue
        if path.is_dir():
            if "**" not in pattern:
                passed.add("folders", path)
        elif not path.exists():
            passed.add("links to nothing", path)
        elif _is_read(path, passed):
            found.append(path)
    passed.tell(pattern, notify)
    if not found:
        shown = printable(pattern)
        raise InputError(f"the glob {shown} matches no file to read: expected names that end in one of {KNOWN}")
    return found


def _refuse_loop(path: Path) -> None:
    """`glob` walks round a loop of links until the system stops it, and yields the same files again and again."""
    for link in [parent for parent in path.parents if parent.is_symlink()]:
        if Path(os.path.realpath(link.parent)).is_relative_to(os.path.realpath(link)):
            raise InputError(f"the link {printable(link)} leads back to a folder above it, round and round: remove it")


def _short_names(paths: Sequence[Path]) -> list[str]:
    try:
        shared = Path(os.path.commonpath([path.parent for path in paths]))
    except ValueError:  # on drives of their own
        return [path.as_posix() for path in paths]
    return [path.relative_to(shared).as_posix() for path in paths]
