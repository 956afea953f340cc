"""The corpus as shards: consecutive rows of all input files in order. Where a shard ends is a pure function of the
files and the settings, so that a job that was stopped cuts the same shards when it goes on."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from llm2vec_fast.data.columns import Columns
from llm2vec_fast.data.delimited import Csv
from llm2vec_fast.data.inputs import InputFile
from llm2vec_fast.data.reading import damaged_from, open_reader
from llm2vec_fast.data.rows import Problem, Row, RowReader, text_of
from llm2vec_fast.data.streams import DAMAGE
from llm2vec_fast.data.values import id_problem, kept_problem, shown_value
from llm2vec_fast.errors import ChangedError, InputError

SHARD_BYTES = 64 << 20  # of text: a shard of very long texts ends early, so that memory stays bounded
CHECK_EVERY = 1024  # rows between two looks at the stop flag


@dataclass(frozen=True)
class Cursor:
    """A place in the corpus: ``row`` rows of file number ``file`` are read, the next starts at byte ``offset``.

    ``offset`` counts decompressed bytes, ``consumed`` those of the file on disk, at the ends of shards only; ``line``
    counts the lines of text files.
    """

    file: int = 0
    row: int = 0
    offset: int = 0
    consumed: int = 0
    line: int = 0


@dataclass
class Shard:
    """Rows to embed together, in order. ``ids``, ``texts``, ``places`` and each kept column are equally long. Ids and
    kept values are as `data.values.to_array` takes them; a place is a file, a row and, where it has lines, a line."""

    index: int
    start: Cursor
    end: Cursor
    ids: list[Any] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    places: list[tuple[str, int, int | None]] = field(default_factory=list)
    kept: dict[str, list[Any]] = field(default_factory=dict)
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
        types: of the id and of what is kept, as they will be written.
        csv: how csv and tsv files are written.
        rows_per_shard: rows that end a shard; bad rows count, so that no shard depends on what an encoder does.
        stop: set from another thread, it ends a read with StopReadingError.
    """

    def __init__(
        self,
        files: Sequence[InputFile],
        columns: Columns,
        types: Mapping[str, pa.DataType],
        csv: Csv,
        rows_per_shard: int,
        stop: threading.Event | None = None,
    ) -> None:
        self.files = files
        self._columns = columns
        self._types = types
        self._csv = csv
        self._rows_per_shard = rows_per_shard
        self._stop = stop or threading.Event()
        self._reader: RowReader | None = None
        self._rows: Iterator[Row] = iter(())
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
            text_bytes += _add(shard, row, (file.name, number, row.line), self._columns, self._types)

    def _next_row(self, file: InputFile) -> Row | None:
        """The next row of the file at hand, None at its end; a damaged rest of a file comes as one bad row."""
        if file.bytes == 0:
            return None
        at = self._cursor
        try:
            if self._reader is None:
                _require_unchanged(file)
                asked = self._columns.asked
                self._reader = open_reader(file, asked, self._csv, at.row, at.offset, at.line)
                self._rows = iter(self._reader)
            row = next(self._rows, None)
        except DAMAGE as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise _unreadable(file, error) from error
            self._next_file()
            return damaged_from(at.row + 1, error, len(self._columns.asked))
        if row is not None:
            offset, line = (self._reader.offset, self._reader.line) if self._reader else (at.offset, at.line)
            self._cursor = Cursor(at.file, at.row + row.rows, offset, line=line)
        return row

    def _next_file(self) -> None:
        self.close()
        self._cursor = Cursor(self._cursor.file + 1)

    def _position(self, cursor: Cursor) -> int:
        return sum(file.bytes for file in self.files[: cursor.file]) + cursor.consumed


def _require_unchanged(file: InputFile) -> None:
    try:
        status = Path(file.path).stat()
    except OSError as error:
        raise _unreadable(file, error) from error
    if (status.st_size, status.st_mtime_ns) != (file.bytes, file.modified_ns):
        raise ChangedError(f"input {file.shown} changed while the job ran: start again in a new --output folder")


def _unreadable(file: InputFile, error: OSError) -> InputError:
    return InputError(f"input {file.shown} cannot be read: {error.strerror}; once it can, the same command goes on")


def _add(
    shard: Shard, row: Row, place: tuple[str, int, int | None], columns: Columns, types: Mapping[str, pa.DataType]
) -> int:
    """Put a row where it belongs; returns its bytes of text, roughly."""
    name, number, line = place
    text, wrong = text_of(row.values[0]) if row.problem is None else ("", row.problem)
    identifier = row.values[1] if columns.id is not None and row.values else f"{name}:{number}"
    kept = row.values[len(row.values) - len(columns.keep) :]
    if wrong is None and columns.id is not None:
        wrong = id_problem(identifier, columns.id) or kept_problem(identifier, columns.id, types[columns.id])
    for column, value in zip(columns.keep, kept, strict=True):
        wrong = wrong or kept_problem(value, column, types[column])
    if wrong is not None:
        known = None if row.damaged else shown_value(identifier)
        shard.problems.append(Problem(name, number, known, wrong, row.rows, row.damaged, line))
        return len(wrong)
    shard.ids.append(identifier)
    shard.texts.append(text)
    shard.places.append(place)
    for column, value in zip(columns.keep, kept, strict=True):
        shard.kept[column].append(value)
    return len(text) + sum(_size(value) for value in kept)


def _size(value: Any) -> int:
    """Bytes of a value, roughly."""
    if isinstance(value, pa.Array):
        return value.nbytes
    return len(value) if isinstance(value, str | bytes | list | dict) else 8
