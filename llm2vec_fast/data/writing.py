"""Rows become a file of JSON lines or of Parquet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from llm2vec_fast.data.tables import Rows
from llm2vec_fast.data.values import json_bytes

_AT_ONCE = 1024


class Added(NamedTuple):
    """A column that is new, a value a row, and its type in a parquet file."""

    values: Sequence[Any]
    type: pa.DataType

    def chunks(self) -> pa.ChunkedArray:
        """In pieces, as one array holds no more than 2 GiB of texts."""
        starts = range(0, len(self.values), _AT_ONCE)
        return pa.chunked_array([pa.array(self.values[i : i + _AT_ONCE], self.type) for i in starts], self.type)


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
        file.write(json_bytes(whole) + b"\n")
