"""All rows of some files with every column as it is there, for what is written again with nothing lost."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from llm2vec_fast.data.columns import value_in
from llm2vec_fast.data.delimited import Csv
from llm2vec_fast.data.inputs import InputFile
from llm2vec_fast.data.parquet import column_at, find_column, read_tables
from llm2vec_fast.data.reading import rows_of
from llm2vec_fast.data.rows import Asked, Problem
from llm2vec_fast.data.values import python_values
from llm2vec_fast.errors import InputError, UserError

_AT_ONCE = 1024


class Rows(ABC):
    """Rows of named columns; ``places`` has the file, the row and perhaps the line of each."""

    names: list[str]
    places: list[tuple[str, int, int | None]]

    @abstractmethod
    def column(self, name: str) -> list[Any]:
        """Its values, None where a row has none; a field behind dots, too."""

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
    """Rows of parquet files."""

    def __init__(self, table: pa.Table, places: list[tuple[str, int, int | None]]) -> None:
        self._table, self.names, self.places = table, table.column_names, places

    def column(self, name: str) -> list[Any]:
        """See `Rows`."""
        found = find_column(self._table.schema, name)
        if found is None:
            raise KeyError(name)
        return [x for batch in self._table.to_batches(_AT_ONCE) for x in python_values(column_at(batch, found.path))]

    def kept(self, places: Sequence[int]) -> TableRows:
        """See `Rows`."""
        chosen = set(places)
        mask = pa.array([i in chosen for i in range(len(self._table))], pa.bool_())
        return TableRows(self._table.filter(mask), [self.places[i] for i in places])

    def records(self) -> Iterator[dict[str, Any]]:
        """See `Rows`."""
        for batch in self._table.to_batches(_AT_ONCE):
            columns = [python_values(column) for column in batch.columns]
            for values in zip(*columns, strict=True):
                yield dict(zip(self.names, values, strict=True))

    def table(self) -> pa.Table:
        """See `Rows`."""
        return self._table


@dataclass
class RecordRows(Rows):
    """Rows of files without types."""

    names: list[str]
    values: list[dict[str, Any]]
    places: list[tuple[str, int, int | None]]

    def column(self, name: str) -> list[Any]:
        """See `Rows`."""
        return [value_in(row, name)[1] for row in self.values]

    def kept(self, places: Sequence[int]) -> RecordRows:
        """See `Rows`."""
        return RecordRows(self.names, [self.values[i] for i in places], [self.places[i] for i in places])

    def records(self) -> Iterator[dict[str, Any]]:
        """See `Rows`."""
        return iter(self.values)

    def table(self) -> pa.Table:
        """See `Rows`."""
        return pa.table({name: _typed(name, [row.get(name) for row in self.values]) for name in self.names})


def all_rows(files: Sequence[InputFile], asked: Sequence[Asked], csv: Csv) -> tuple[Rows, list[Problem]]:
    """All rows of some files with all their columns, and those that cannot be read. Values of csv and tsv files are
    strings.

    Args:
        asked: columns that they need to have.

    Raises:
        InputError: a file is damaged, empty or not of its format, or parquet is among other formats.
    """
    formats = {file.format == "parquet" for file in files}
    if len(formats) == 2:
        raise InputError(f"{files[0].shown} and others are of several formats: give parquet files alone, or none")
    if formats == {True}:
        tables = read_tables(files)
        counts = [(file.name, len(table)) for file, table in zip(files, tables, strict=True)]
        numbered = [(name, row, None) for name, count in counts for row in range(1, count + 1)]
        return TableRows(pa.concat_tables(tables), numbered), []
    values: list[dict[str, Any]] = []
    places: list[tuple[str, int, int | None]] = []
    problems = []
    for file in files:
        number = 1
        for row in rows_of(file, asked, csv, whole=True):
            if row.damaged:
                raise InputError(f"{file.shown}: {row.problem}")
            if row.problem is None:
                values.append(row.values[0])
                places.append((file.name, number, row.line))
            else:
                problems.append(Problem(file.name, number, None, row.problem, row.rows, line=row.line))
            number += row.rows
    return RecordRows(list(dict.fromkeys(name for row in values for name in row)), values, places), problems


def _typed(name: str, values: list[Any]) -> pa.Array:
    try:
        found = pa.array(values)
        pq.write_table(pa.table({name: found}).slice(0, 0), pa.BufferOutputStream())  # not all types can be
        if not all(map(_same, values, found.to_pylist())):
            raise OverflowError("its values would be others")
    except (pa.ArrowException, OverflowError, UnicodeError) as error:
        raise UserError(
            f"the column {name!r} does not fit a parquet file ({' '.join(str(error).split())[:100]}): give an --output "
            "that ends in .jsonl"
        ) from error
    return found


def _same(value: Any, found: Any) -> bool:
    """Whether what an array holds is what it was made of: 1 is not 1.0. Fields that an object lacks are null there."""
    if isinstance(value, dict) and isinstance(found, dict):
        return all(_same(value.get(name), found.get(name)) for name in value.keys() | found.keys())
    if isinstance(value, list) and isinstance(found, list):
        return len(value) == len(found) and all(map(_same, value, found))
    return type(value) is type(found) and (value == found or value != value)
