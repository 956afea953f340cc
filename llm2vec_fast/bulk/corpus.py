"""The corpus as shards: consecutive rows of all input files in order. Where a shard ends is a pure function of the
files and the settings, so that a job that was stopped cuts the same shards when it goes on."""

from __future__ import annotations

import json
import lzma
import threading
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from llm2vec_fast.bulk.inputs import InputFile
from llm2vec_fast.bulk.readers import Columns, RawRow, RowReader, open_reader
from llm2vec_fast.errors import ChangedError, InputError

SHARD_BYTES = 64 << 20  # of text: a shard of very long texts ends early, so that memory stays bounded
DAMAGE = (EOFError, OSError, zlib.error, lzma.LZMAError)
CHECK_EVERY = 1024  # rows between two looks at the stop flag


@dataclass(frozen=True)
class Cursor:
    """A place in the corpus: ``row`` rows of file number ``file`` are read, the next starts at byte ``offset``.

    ``offset`` counts decompressed bytes, ``consumed`` those of the file on disk, at the ends of shards only.
    """

    file: int = 0
    row: int = 0
    offset: int = 0
    consumed: int = 0


class Problem(NamedTuple):
    """A row (1-based) that is not embedded, and why. ``rows`` rows where one damage hides several."""

    file: str
    row: int
    id: str | None
    reason: str
    rows: int = 1
    damage: bool = False


@dataclass
class Shard:
    """Rows to embed together, in order. ``ids``, ``texts``, ``places`` and each kept column are equally long."""

    index: int
    start: Cursor
    end: Cursor
    ids: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    places: list[tuple[str, int]] = field(default_factory=list)
    kept: dict[str, list[str | None]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    rows_read: int = 0
    input_bytes: int = 0


class StopReadingError(Exception):
    """The job was told to stop while a shard was being read."""


class Corpus:
    """Reads shards one after the other; the file at hand stays open between two of them.

    Args:
        files: the input files, in order.
        columns: which columns hold text, id and what is kept.
        rows_per_shard: rows that end a shard; bad rows count, so that no shard depends on what an encoder does.
        stop: set from another thread, it ends a read with StopReadingError.
    """

    def __init__(
        self, files: Sequence[InputFile], columns: Columns, rows_per_shard: int, stop: threading.Event | None = None
    ) -> None:
        self.files = files
        self._columns = columns
        self._rows_per_shard = rows_per_shard
        self._stop = stop or threading.Event()
        self._reader: RowReader | None = None
        self._rows: Iterator[RawRow] = iter(())
        self._cursor = Cursor()

    def read(self, index: int, start: Cursor) -> Shard | None:
        """The shard that starts at ``start``; None at the end of the corpus.

        Raises:
            ChangedError: a file changed since the job began.
            InputError: a file cannot be read for a reason outside it (the disk, its rights).
            StopReadingError: the stop flag was set.
        """
        if start != self._cursor:
            self.close()
            self._cursor = start
        shard = Shard(index, start, start, kept={name: [] for name in self._columns.keep})
        self._fill(shard)
        self._cursor = replace(self._cursor, consumed=self._reader.consumed() if self._reader else 0)
        shard.end = self._cursor
        shard.input_bytes = self._position(shard.end) - self._position(start)
        return shard if shard.rows_read or shard.problems else None

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()
        self._reader = None

    def _fill(self, shard: Shard) -> None:
        text_bytes = 0
        while shard.rows_read < self._rows_per_shard and text_bytes < SHARD_BYTES:
            if self._cursor.file == len(self.files):
                return
            if shard.rows_read % CHECK_EVERY == 0 and self._stop.is_set():
                raise StopReadingError
            file, number = self.files[self._cursor.file], self._cursor.row + 1
            row = self._next_row(file)
            if row is None:
                self._next_file()
                continue
            shard.rows_read += row.rows
            text_bytes += _add(shard, row, file.name, number, self._columns)

    def _next_row(self, file: InputFile) -> RawRow | None:
        """The next row of the file at hand, None at its end; a damaged rest of a file comes as one bad row."""
        if file.bytes == 0:
            return None
        try:
            if self._reader is None:
                _require_unchanged(file)
                self._reader = open_reader(file, self._columns, self._cursor.row, self._cursor.offset)
                self._rows = iter(self._reader)
            row = next(self._rows, None)
        except DAMAGE as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise _unreadable(file, error) from error
            reason = f"from row {self._cursor.row + 1} on the file cannot be read: {error or 'it ends too early'}"
            self._next_file()
            return RawRow(problem=reason, rows=0, damaged=True)
        if row is not None:
            offset = self._reader.offset if self._reader else self._cursor.offset
            self._cursor = Cursor(self._cursor.file, self._cursor.row + row.rows, offset)
        return row

    def _next_file(self) -> None:
        self.close()
        self._cursor = Cursor(self._cursor.file + 1)

    def _position(self, cursor: Cursor) -> int:
        return sum(file.bytes for file in self.files[: cursor.file]) + cursor.consumed


def check_inputs(files: Sequence[InputFile], columns: Columns) -> list[str]:
    """Look at the head of every file before the work begins. Returns sentences about files that hold nothing.

    Raises:
        InputError: a file lacks a column, is not of its format, or every file is empty.
    """
    empty = [file for file in files if file.bytes == 0]
    if len(empty) == len(files):
        names = files[0].path if len(files) == 1 else f"all {len(files)} input files"
        raise InputError(f"nothing to embed: {names} {'is' if len(files) == 1 else 'are'} empty (0 bytes)")
    for file in files:
        if file.bytes:
            _check_head(file, columns)
    return [f"{file.path} is empty (0 bytes): skipped" for file in empty]


def _check_head(file: InputFile, columns: Columns) -> None:
    with open(file.path, "rb") as head:
        mark = head.read(2)
    if file.format != "parquet" and mark in (b"\xff\xfe", b"\xfe\xff"):
        raise InputError(f"{file.path} is UTF-16: convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)")
    try:
        open_reader(file, columns).close()
    except DAMAGE as error:
        raise InputError(f"{file.path} cannot be read: {error or 'it ends too early'}") from error


def _require_unchanged(file: InputFile) -> None:
    try:
        status = Path(file.path).stat()
    except OSError as error:
        raise _unreadable(file, error) from error
    if (status.st_size, status.st_mtime_ns) != (file.bytes, file.modified_ns):
        raise ChangedError(f"input {file.path} changed while the job ran: start again in a new --output folder")


def _unreadable(file: InputFile, error: OSError) -> InputError:
    return InputError(f"input {file.path} cannot be read: {error.strerror}; once it can, the same command goes on")


def _add(shard: Shard, row: RawRow, name: str, number: int, columns: Columns) -> int:
    """Put a row where it belongs; returns its bytes of text, roughly."""
    text, identifier = _as_text(row.text), row.id
    problem = row.problem or _text_problem(text, row.text)
    if problem is None and columns.id is not None:
        problem = _id_problem(identifier, columns.id)
    known = str(identifier) if isinstance(identifier, str | int | float) else None
    if problem is not None:
        known = known if columns.id else f"{name}:{number}"
        shard.problems.append(Problem(name, number, None if row.damaged else known, problem, row.rows, row.damaged))
        return len(problem)
    shard.ids.append(f"{name}:{number}" if columns.id is None else str(identifier))
    shard.texts.append(text)
    shard.places.append((name, number))
    kept_bytes = 0
    for column, value in zip(columns.keep, row.kept, strict=True):
        shard.kept[column].append(kept := _as_kept(value))
        kept_bytes += len(kept or "")
    return len(text) + kept_bytes


def _as_text(value: Any) -> Any:
    """Bytes become text, or the error that says why they are none; anything else stays."""
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        return error


def _text_problem(text: Any, raw: Any) -> str | None:
    if text is None:
        return "the text is null"
    if isinstance(text, UnicodeDecodeError):
        return f"byte 0x{text.object[text.start]:02x} at byte {text.start} of the text is not UTF-8"
    if not isinstance(text, str):
        return f"the text is not a string but {type(raw).__name__} {str(raw)[:40]!r}"
    if not text or text.isspace():
        return "the text is empty"
    return _surrogate_problem(text, "text")


def _id_problem(identifier: Any, column: str) -> str | None:
    if isinstance(identifier, bool) or not isinstance(identifier, str | int | float) or identifier == "":
        shown = "null" if identifier is None else repr(identifier)[:40]
        return f"the id (column {column!r}) is {shown}, not a string or number"
    return _surrogate_problem(str(identifier), "id")


def _surrogate_problem(text: str, what: str) -> str | None:
    if text.isascii():
        return None
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"the {what} holds half a surrogate pair (U+{ord(text[error.start]):04X}), which is not text"
    return None


def _as_kept(value: Any) -> str | None:
    if value is None:
        return None
    shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return shown.encode("utf-8", "replace").decode()
