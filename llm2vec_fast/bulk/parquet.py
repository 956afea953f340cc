"""Rows of a Parquet file: rows already done are skipped by row group, a damaged row group costs only its own rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from llm2vec_fast.bulk.inputs import InputFile
from llm2vec_fast.bulk.readers import Columns, RawRow, require_columns
from llm2vec_fast.errors import InputError

BATCH_ROWS = 512  # a batch of the longest allowed texts still fits in memory
BUFFER_BYTES = 1 << 20  # of a column chunk at a time, not the whole of it


class ParquetReader:
    """Reads the columns asked for, a batch at a time, from row ``row`` (0-based) on."""

    def __init__(self, file: InputFile, columns: Columns, row: int = 0) -> None:
        try:
            self._file = pq.ParquetFile(file.path, buffer_size=BUFFER_BYTES, pre_buffer=False)
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{file.path} is not a Parquet file that can be read: {_first_line(error)}") from error
        require_columns(file, columns, self._file.schema_arrow.names)
        _require_text(file, columns.text, self._file.schema_arrow.field(columns.text).type)
        self._columns = columns
        self._bytes = file.bytes
        self._total = self._file.metadata.num_rows
        self._row = row
        self.offset = 0

    def __iter__(self) -> Iterator[RawRow]:
        first = 0
        for group in range(self._file.num_row_groups):
            after = first + self._file.metadata.row_group(group).num_rows
            if self._row < after:
                yield from self._rows_of(group, first, after)
            first = after

    def consumed(self) -> int:
        return self._bytes * self._row // max(self._total, 1)

    def close(self) -> None:
        self._file.close(force=True)

    def _rows_of(self, group: int, first: int, after: int) -> Iterator[RawRow]:
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
                yield RawRow(problem=reason + _first_line(error), rows=lost, damaged=True)
                return
            skipped = max(0, min(self._row - place, batch.num_rows))
            place += batch.num_rows
            for row in self._rows(batch.slice(skipped)):
                self._row += 1
                yield row

    def _batches(self, group: int) -> Iterator[pa.RecordBatch]:
        names = dict.fromkeys(
            name for name in (self._columns.text, self._columns.id, *self._columns.keep) if name is not None
        )
        return self._file.iter_batches(BATCH_ROWS, row_groups=[group], columns=list(names), use_threads=False)

    def _rows(self, batch: pa.RecordBatch) -> Iterator[RawRow]:
        texts = _values(batch.column(self._columns.text))
        ids = _values(batch.column(self._columns.id)) if self._columns.id else [None] * batch.num_rows
        keep = [_values(batch.column(name)) for name in self._columns.keep]
        for place, (text, identifier) in enumerate(zip(texts, ids, strict=True)):
            yield RawRow(text, identifier, [values[place] for values in keep])


def _require_text(file: InputFile, name: str, kind: pa.DataType) -> None:
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    views = (pa.types.is_string_view, pa.types.is_binary_view)
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary, *views)
    if not any(test(value) for test in tests) and not pa.types.is_null(value):
        raise InputError(f"column {name!r} of {file.path} holds {kind}, not text: choose another with --text-column")


def _values(column: pa.Array) -> list[Any]:
    """The column's values as Python objects; bytes that are not UTF-8 stay bytes."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        dense = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
        return dense.cast(pa.large_binary()).to_pylist()


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
