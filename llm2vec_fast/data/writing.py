"""The rows of a file of pairs as they are there, read and written with nothing lost: datasets' readers and writers cut
floats, take texts for dates, and make floats of whole numbers."""

from __future__ import annotations

import base64
import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from llm2vec_fast.errors import UserError

READERS = (".jsonl", ".json", ".csv", ".parquet")
_AT_ONCE = 1024
_WHOLE = re.compile(r"0|-?[1-9][0-9]{0,17}")  # as Python writes it, and within 64 bits


class Rows(ABC):
    """Rows of named columns."""

    names: list[str]

    @abstractmethod
    def column(self, name: str) -> list[Any]:
        """Its values, None where a row has none."""

    @abstractmethod
    def kept(self, places: Sequence[int]) -> Rows:
        """The rows of these numbers, which ascend."""

    @abstractmethod
    def records(self) -> Iterator[dict[str, Any]]:
        """Each row's values by column."""

    @abstractmethod
    def table(self) -> pa.Table:
        """All of them as parquet files hold them.

        Raises:
            UserError: a column's values are not of one type.
        """


class TableRows(Rows):
    """Rows of a parquet file."""

    def __init__(self, table: pa.Table) -> None:
        self._table, self.names = table, table.column_names

    def column(self, name: str) -> list[Any]:
        """See `Rows`."""
        return self._table[name].to_pylist()

    def kept(self, places: Sequence[int]) -> TableRows:
        """See `Rows`."""
        chosen = set(places)
        return TableRows(self._table.filter(pa.array([i in chosen for i in range(len(self._table))])))

    def records(self) -> Iterator[dict[str, Any]]:
        """See `Rows`."""
        for batch in self._table.to_batches(_AT_ONCE):
            yield from batch.to_pylist()

    def table(self) -> pa.Table:
        """See `Rows`."""
        return self._table


@dataclass
class RecordRows(Rows):
    """Rows of a file without types."""

    names: list[str]
    values: list[dict[str, Any]]

    def column(self, name: str) -> list[Any]:
        """See `Rows`."""
        return [row.get(name) for row in self.values]

    def kept(self, places: Sequence[int]) -> RecordRows:
        """See `Rows`."""
        return RecordRows(self.names, [self.values[i] for i in places])

    def records(self) -> Iterator[dict[str, Any]]:
        """See `Rows`."""
        return iter(self.values)

    def table(self) -> pa.Table:
        """See `Rows`."""
        return pa.table({name: _typed(name, self.column(name)) for name in self.names})


class Added(NamedTuple):
    """A column that is new, a value a row, and its type in a parquet file."""

    values: Sequence[Any]
    type: pa.DataType

    def chunks(self) -> pa.ChunkedArray:
        """In pieces, as one array holds no more than 2 GiB of texts."""
        starts = range(0, len(self.values), _AT_ONCE)
        return pa.chunked_array([pa.array(self.values[i : i + _AT_ONCE], self.type) for i in starts], self.type)


def read_rows_of(path: Path, texts: Collection[str] = ()) -> Rows:
    """All rows of a file. Values of csv files are texts, and whole numbers where a column has no other.

    Args:
        path: jsonl, json, csv or parquet.
        texts: columns that are never numbers.

    Raises:
        UserError: the file is damaged, empty, or of an unknown format.
    """
    kind = path.suffix.lower()
    if kind not in READERS:
        raise UserError(f"{path} ends in {kind!r}, which is not known: give one of {', '.join(READERS)}")
    try:
        if kind == ".parquet":
            with pq.ParquetFile(path) as file:
                rows: Rows = TableRows(file.read())
        else:
            rows = _of_csv(path, texts) if kind == ".csv" else _of_json(path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: save it as UTF-8") from error
    except (OSError, ValueError) as error:  # pyarrow's and pandas' are of these
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())[:300]}") from error
    if not rows.names:
        raise UserError(f"{path} is empty: give a file with pairs")
    return rows


def write_rows(file: BinaryIO, rows: Rows, added: Mapping[str, Added], *, parquet: bool) -> None:
    """Rows with columns added, in the place of those of the same names: a parquet file, or a JSON object a line.

    JSON has no dates, which are written as ISO 8601 texts; no bytes, which are base64; no NaN, which is null.
    """
    if parquet:
        table = rows.table().drop_columns([name for name in added if name in rows.names])
        for name, column in added.items():
            table = table.append_column(name, column.chunks())
        pq.write_table(table, file)
        return
    for row, *values in zip(rows.records(), *(column.values for column in added.values()), strict=True):
        whole = {**{name: x for name, x in row.items() if name not in added}, **dict(zip(added, values, strict=True))}
        file.write(_line(whole) + b"\n")


def _of_json(path: Path) -> RecordRows:
    """An object a line, or a list of objects."""
    rows: list[Any] = []
    with path.open(encoding="utf-8-sig") as lines:
        if path.suffix.lower() == ".json" and lines.read(1) == "[":
            lines.seek(0)
            rows = json.load(lines)
        else:
            lines.seek(0)
            for number, line in enumerate(lines, 1):
                try:
                    rows += [json.loads(line)] if line.strip() else []
                except ValueError as error:
                    raise UserError(f"line {number} of {path} is not JSON: {error}") from error
    other = next((number for number, row in enumerate(rows, 1) if not isinstance(row, dict)), None)
    if other is not None:
        raise UserError(f"row {other} of {path} is no JSON object: write its columns as {{name: value}}")
    return RecordRows(list(dict.fromkeys(name for row in rows for name in row)), rows)


def _of_csv(path: Path, texts: Collection[str]) -> RecordRows:
    import pandas

    found = pandas.read_csv(path, dtype=str, keep_default_na=False, na_values=[""])
    columns = {}
    for name in map(str, found.columns):
        values = [x if isinstance(x, str) else None for x in found[name]]
        columns[name] = values if name in texts else _whole_numbers(values)
    return RecordRows(
        list(columns), [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    )


def _whole_numbers(values: list[str | None]) -> list[Any]:
    """The same as numbers, if every one would be written as it is here: 007 is a text."""
    if all(x is None or _WHOLE.fullmatch(x) for x in values):
        return [None if x is None else int(x) for x in values]
    return values


def _typed(name: str, values: list[Any]) -> pa.Array:
    try:
        found = pa.array(values)
        pq.write_table(pa.table({name: found}).slice(0, 0), pa.BufferOutputStream())  # not all types can be
    except (pa.ArrowException, OverflowError) as error:
        raise UserError(
            f"the column {name!r} does not fit a parquet file ({' '.join(str(error).split())[:100]}): give an --output "
            "that ends in .jsonl"
        ) from error
    return found


def _line(row: dict[str, Any]) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False, default=_plain).encode()
    except UnicodeEncodeError:  # half a character, which only an escape can write
        return json.dumps(row, allow_nan=False, default=_plain).encode()
    except ValueError:
        return _line(_finite(row))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plain(value: Any) -> str:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return value.isoformat() if hasattr(value, "isoformat") else str(value)
