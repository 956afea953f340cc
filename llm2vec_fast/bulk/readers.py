"""Rows of one input file, a few at a time, from any row on. Each format has one reader; none holds a whole file."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, BinaryIO, NamedTuple, Protocol

from llm2vec_fast.bulk.inputs import InputFile
from llm2vec_fast.errors import InputError

MAX_ROW_BYTES = 64 << 20  # a longer line or field is a bad row: no text is, and memory stays bounded
SAMPLED_ROWS = 100  # of a jsonl file, to tell a wrong column name from a row that lacks the field
CSV_DELIMITERS = ",;\t|"


@dataclass(frozen=True)
class Columns:
    """The columns a job reads: the text, the id (None: rows are numbered), and those kept beside the embedding."""

    text: str = "text"
    id: str | None = None
    keep: tuple[str, ...] = ()


class RawRow(NamedTuple):
    """One row as read. ``problem`` says why it is unusable; where the file is damaged it stands for ``rows`` rows."""

    text: Any = None
    id: Any = None
    kept: Sequence[Any] = ()
    problem: str | None = None
    rows: int = 1
    damaged: bool = False


class RowReader(Protocol):
    """Iterates over RawRow; ``offset`` and the row count after any row are where a later reader can start."""

    offset: int

    def __iter__(self) -> Iterator[RawRow]: ...

    def consumed(self) -> int:
        """Bytes of the file on disk that the rows so far took, roughly."""
        ...

    def close(self) -> None: ...


def open_reader(file: InputFile, columns: Columns, row: int = 0, offset: int = 0) -> RowReader:
    """A reader that goes on after ``row`` rows, where ``offset`` is the one that a reader had there.

    Raises:
        InputError: a column is missing (the message names those there are), or the file is not of its format.
    """
    if file.format == "parquet":
        from llm2vec_fast.bulk.parquet import ParquetReader

        return ParquetReader(file, columns, row)
    readers: Mapping[str, Callable[..., RowReader]] = {
        "txt": TextReader,
        "jsonl": JsonLinesReader,
        "csv": DelimitedReader,
        "tsv": DelimitedReader,
    }
    return readers[file.format](file, columns, offset)


def require_columns(file: InputFile, columns: Columns, available: Sequence[str]) -> None:
    """Refuse a file without the columns asked for, by name.

    Raises:
        InputError: a column is missing.
    """
    named = {"--text-column": [columns.text], "--id-column": [columns.id], "--keep-columns": columns.keep}
    for option, names in named.items():
        missing = [name for name in names if name is not None and name not in available]
        if missing:
            there = ", ".join(map(repr, available)) or "none"
            raise InputError(f"{file.path} has no column {missing[0]!r} ({option}): its columns are {there}")


class Lines:
    """Decoded lines with their line ends, from a byte offset on; ``problem`` tells what is wrong with those since
    `forget`: bytes that are not UTF-8, or a line of more than MAX_ROW_BYTES."""

    def __init__(self, file: InputFile, offset: int = 0) -> None:
        self._raw = open(file.path, "rb")  # noqa: SIM115 - closed by close()
        openers: dict[str, Callable[[BinaryIO], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
        self._stream: Any = openers.get(file.compression, lambda raw: raw)(self._raw)
        self.offset = offset
        self.problem: str | None = None
        if offset:
            self._stream.seek(offset)

    def __iter__(self) -> Lines:
        return self

    def __next__(self) -> str:
        line = self._stream.readline(MAX_ROW_BYTES)
        if not line:
            raise StopIteration
        start, self.offset = self.offset, self.offset + len(line)
        if len(line) == MAX_ROW_BYTES and not line.endswith(b"\n"):
            line = self._skip_rest(start)
        try:
            return line.decode("utf-8-sig" if start == 0 else "utf-8")
        except UnicodeDecodeError as error:
            bad, place = error.object[error.start], start + error.start
            self.problem = self.problem or f"byte 0x{bad:02x} at byte {place} of the file is not UTF-8"
            return line.decode("utf-8", "replace")

    def forget(self) -> str | None:
        """The problem since the last call, if any."""
        problem, self.problem = self.problem, None
        return problem

    def consumed(self) -> int:
        return self._raw.tell()

    def close(self) -> None:
        self._stream.close()
        self._raw.close()

    def _skip_rest(self, start: int) -> bytes:
        self.problem = f"the line that starts at byte {start} of the file is longer than {MAX_ROW_BYTES >> 20} MiB"
        line = b"-"
        while line and not line.endswith(b"\n"):
            line = self._stream.readline(MAX_ROW_BYTES)
            self.offset += len(line)
        return b""


class TextReader:
    """A text a line; its only column is "text", whatever the text column of other files is called."""

    def __init__(self, file: InputFile, columns: Columns, offset: int = 0) -> None:
        require_columns(file, Columns("text", columns.id, columns.keep), ["text"])
        self._lines = Lines(file, offset)
        self._columns = columns
        self.offset = offset
        self.consumed = self._lines.consumed
        self.close = self._lines.close

    def __iter__(self) -> Iterator[RawRow]:
        for line in self._lines:
            text = line.rstrip("\r\n")
            self.offset = self._lines.offset
            named = {"text": text}
            yield RawRow(text, text, [named[name] for name in self._columns.keep], self._lines.forget())


class JsonLinesReader:
    """A JSON object a line. Blank lines count as rows, so that a row's number is its line's, and are bad rows."""

    def __init__(self, file: InputFile, columns: Columns, offset: int = 0) -> None:
        self._columns = columns
        self.offset = offset
        if offset == 0:
            self._require_columns(file)
        self._lines = Lines(file, offset)
        self.consumed = self._lines.consumed
        self.close = self._lines.close

    def __iter__(self) -> Iterator[RawRow]:
        for line in self._lines:
            self.offset = self._lines.offset
            record, problem = _parse_object(line, self._lines.forget())
            if problem is None and self._columns.text not in record:
                problem = f"the row has no field {self._columns.text!r}, only {', '.join(map(repr, record)) or 'none'}"
            identifier = record.get(self._columns.id) if self._columns.id else None
            kept = [record.get(name) for name in self._columns.keep]
            yield RawRow(record.get(self._columns.text), identifier, kept, problem)

    def _require_columns(self, file: InputFile) -> None:
        lines = Lines(file)
        try:
            parsed = [_parse_object(line, lines.forget()) for line in islice(lines, SAMPLED_ROWS)]
        finally:
            lines.close()
        good = [record for record, problem in parsed if problem is None]
        if good:
            require_columns(file, self._columns, list(dict.fromkeys(name for record in good for name in record)))


def _parse_object(line: str, problem: str | None) -> tuple[dict[str, Any], str | None]:
    if problem is not None:
        return {}, problem
    if not line.strip():
        return {}, "the line is blank"
    try:
        record = json.loads(line.rstrip())
    except json.JSONDecodeError as error:
        return {}, f"the line is not JSON: {error.msg} at character {error.pos + 1}"
    except (ValueError, RecursionError) as error:  # an integer of 10,000 digits, a list nested as deep
        return {}, f"the line is not JSON that can be read: {error}"
    if not isinstance(record, dict):
        return {}, f"the line is a JSON {_json_kind(record)}, not an object with fields"
    return record, None


def _json_kind(value: Any) -> str:
    kinds = {str: "string", bool: "boolean", int: "number", float: "number", list: "list", type(None): "null"}
    return kinds.get(type(value), type(value).__name__)


class DelimitedReader:
    """CSV or TSV with a header line; a quoted field may hold line breaks. A row is a record, the header is none."""

    def __init__(self, file: InputFile, columns: Columns, offset: int = 0) -> None:
        csv.field_size_limit(MAX_ROW_BYTES)
        delimiter, header, after_header = _read_header(file, columns)
        self._width = len(header)
        self._text = header.index(columns.text) if header else 0
        self._id = header.index(columns.id) if columns.id and header else None
        self._keep = [header.index(name) for name in columns.keep] if header else []
        self.offset = offset or after_header
        self._lines = Lines(file, self.offset)
        self._records = csv.reader(self._lines, delimiter=delimiter)
        self.consumed = self._lines.consumed
        self.close = self._lines.close

    def __iter__(self) -> Iterator[RawRow]:
        while True:
            try:
                fields = next(self._records)
            except StopIteration:
                return
            except csv.Error as error:
                self._lines.problem = f"the record cannot be read: {error}"
                fields = []
            self.offset = self._lines.offset
            if fields or self._lines.problem:  # a blank line is no record
                yield self._row(fields, self._lines.forget())

    def _row(self, fields: list[str], problem: str | None) -> RawRow:
        if problem is None and len(fields) != self._width:
            problem = f"the record has {len(fields)} fields, the header has {self._width}"
        if problem is not None:
            return RawRow(problem=problem)
        identifier = fields[self._id] if self._id is not None else None
        return RawRow(fields[self._text], identifier, [fields[place] for place in self._keep])


def _read_header(file: InputFile, columns: Columns) -> tuple[str, list[str], int]:
    """The delimiter, the column names (none in an empty file) and where the first record starts."""
    headers: dict[str, tuple[list[str], int]] = {}
    for delimiter in "\t" if file.format == "tsv" else CSV_DELIMITERS:
        lines = Lines(file)
        try:
            header = next(csv.reader(lines, delimiter=delimiter), [])
        except csv.Error as error:
            raise InputError(f"the header of {file.path} cannot be read: {error}") from error
        finally:
            lines.close()
        headers[delimiter] = ([name.strip() for name in header], lines.offset)
        if columns.text in headers[delimiter][0]:
            break
    chosen = delimiter if columns.text in headers[delimiter][0] else max(headers, key=lambda key: len(headers[key][0]))
    header, after = headers[chosen]
    if header:
        require_columns(file, columns, header)
    return chosen, header, after
