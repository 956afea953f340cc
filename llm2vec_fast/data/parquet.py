"""Rows of a Parquet file: rows already done are skipped by row group, a damaged row group costs only its own rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from llm2vec_fast.data.columns import require_columns, require_different
from llm2vec_fast.data.inputs import InputFile
from llm2vec_fast.data.rows import Asked, Row
from llm2vec_fast.data.sniffing import head_of, what_it_is_instead
from llm2vec_fast.data.values import is_text, python_values, stored_type
from llm2vec_fast.errors import InputError

BATCH_ROWS = 512  # a batch of the longest allowed texts still fits in memory
BUFFER_BYTES = 1 << 20  # of a column chunk at a time, not the whole of it


class _Place(NamedTuple):
    """Where a column asked for is: the path of its fields, and its type there."""

    path: tuple[str, ...]
    type: pa.DataType


class ParquetReader:
    """Reads the columns asked for, a batch at a time, from row ``row`` (0-based) on. Values of types that Python has no
    exact equal of stay arrays of one value."""

    def __init__(self, file: InputFile, asked: Sequence[Asked], row: int = 0) -> None:
        self._file = open_parquet(file)
        schema = self._file.schema_arrow
        self._places = {each.name: place for each in asked if (place := find_column(schema, each.name)) is not None}
        nested = [name for name, place in self._places.items() if len(place.path) > 1]
        require_columns(file.shown, asked, [*schema.names, *nested])
        for each in asked:
            if each.text:
                _require_text(file, each, self._places[each.name].type)
        self._asked = asked
        self._bytes = file.bytes
        self._total = self._file.metadata.num_rows
        self._row = row
        self.offset = self.line = 0

    def __iter__(self) -> Iterator[Row]:
        first = 0
        for group in range(self._file.num_row_groups):
            after = first + self._file.metadata.row_group(group).num_rows
            if self._row < after:
                yield from self._rows_of(group, first, after)
            first = after

    def consumed(self) -> int:
        return self._bytes * self._row // max(self._total, 1)

    def close(self) -> None:
        self._file.close()

    def types(self) -> dict[str, pa.DataType]:
        """Of the columns asked for, as they are stored again."""
        return {name: stored_type(place.type) for name, place in self._places.items()}

    def _rows_of(self, group: int, first: int, after: int) -> Iterator[Row]:
        batches = self._batches(group)
        place = first
        while self._row < after:
            try:
                batch = next(batches)
            except (pa.ArrowException, OSError, StopIteration) as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise  # the disk or the network, not the file
                lost, before = after - self._row, self._row
                self._row = after
                reason = f"rows {before + 1} to {after} cannot be read, row group {group} is damaged: "
                nothing = [None] * len(self._asked)
                yield Row(nothing, reason + first_line(error), rows=lost, damaged=True)
                return
            skipped = max(0, min(self._row - place, batch.num_rows))
            place += batch.num_rows
            for row in self._rows(batch.slice(skipped)):
                self._row += 1
                yield row

    def _batches(self, group: int) -> Iterator[pa.RecordBatch]:
        leaves = list(dict.fromkeys(".".join(place.path) for place in self._places.values()))
        return self._file.iter_batches(BATCH_ROWS, row_groups=[group], columns=leaves, use_threads=False)

    def _rows(self, batch: pa.RecordBatch) -> Iterator[Row]:
        nothing = [None] * batch.num_rows
        columns = {name: python_values(column_at(batch, place.path)) for name, place in self._places.items()}
        for values in zip(*(columns.get(each.name, nothing) for each in self._asked), strict=True):
            yield Row(values)


class _OwnedParquetFile(pq.ParquetFile):
    """A ParquetFile of a path of any bytes (pyarrow's own is UTF-8), which closes what it opened."""

    def __init__(self, path: str) -> None:
        opened = open(path, "rb")  # noqa: SIM115 - closed by close()
        try:
            super().__init__(opened, buffer_size=BUFFER_BYTES, pre_buffer=False)
        except BaseException:
            opened.close()
            raise

    def close(self, force: bool = True) -> None:
        super().close(force)


def open_parquet(file: InputFile) -> pq.ParquetFile:
    """The file, of which nothing but the footer is read.

    Raises:
        InputError: it is none.
    """
    try:
        wrong = what_it_is_instead(head_of(file.path, ""), "parquet")
        if wrong is None:
            return _OwnedParquetFile(file.path)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{file.shown} is not a Parquet file that can be read: {first_line(error)}") from error
    raise InputError(f"{file.shown} {wrong}")


def find_column(schema: pa.Schema, name: str) -> _Place | None:
    """The column of this very name, or the field that dots lead to."""
    if name in schema.names:
        return _Place((name,), schema.field(schema.get_all_field_indices(name)[0]).type)
    for dot in [place for place, letter in enumerate(name) if letter == "."]:
        outer, inner = name[:dot], name[dot + 1 :]
        if schema.names.count(outer) == 1 and pa.types.is_struct(schema.field(outer).type):
            found = find_column(pa.schema(list(schema.field(outer).type)), inner)
            if found is not None:
                return _Place((outer, *found.path), found.type)
    return None


def column_at(batch: pa.RecordBatch, path: Sequence[str]) -> pa.Array:
    """The values behind a path of fields; None where a field above has none."""
    column = batch.column(batch.schema.names.index(path[0]))
    for name in path[1:]:
        column = pc.struct_field(column, name)
    return column


def read_tables(files: Sequence[InputFile]) -> list[pa.Table]:
    """All rows and columns of some files, a table a file, which have the same columns.

    Raises:
        InputError: a file is damaged, has two columns of one name, or other columns than the first.
    """
    tables: list[pa.Table] = []
    for file in files:
        with open_parquet(file) as opened:
            require_different(file.shown, opened.schema_arrow.names)
            if tables and not opened.schema_arrow.equals(tables[0].schema):
                raise InputError(f"{file.shown} has other columns or types than {files[0].shown}: make them the same")
            try:
                tables.append(opened.read())
            except (pa.ArrowException, OSError) as error:
                raise InputError(f"{file.shown} cannot be read: {first_line(error)}") from error
    return tables


def _require_text(file: InputFile, asked: Asked, kind: pa.DataType) -> None:
    if not is_text(kind):
        raise InputError(
            f"column {asked.name!r} of {file.shown} holds {kind}, not text: choose another with {asked.option}"
        )


def first_line(error: BaseException) -> str:
    """An error's first line."""
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
