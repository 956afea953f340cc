"""Ids that occur more than once in a folder of embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from llm2vec_fast.bulk.manifest import Part
from llm2vec_fast.data.values import python_values, shown_value

ROWS_LOOKED_AT = 1 << 22  # eight bytes each are held at once
BATCH_ROWS = 8192


def tell_duplicates(parts: Sequence[tuple[Part, Path]], column: str, notify: Callable[[str], None]) -> None:
    """Say how many ids occur more than once, and one of them; of a large folder, among how many rows."""
    total = sum(part.rows for part, _ in parts)
    marks = np.fromiter((hash(_key(value)) for value in _ids(parts)), np.int64)
    found, counts = np.unique(marks, return_counts=True)
    repeated = found[counts > 1]
    among = f" among the first {len(marks):,} rows" if len(marks) < total else ""
    if len(repeated):
        known = set(repeated.tolist())
        first = next(value for value in _ids(parts) if hash(_key(value)) in known)
        rows = int(counts[counts > 1].sum())
        which = f"{shown_value(first)!r} of column {column!r} occurs"
        if len(repeated) > 1:
            which = f"{len(repeated):,} ids of column {column!r}, such as {shown_value(first)!r}, occur"
        notify(f"{which} in {rows:,} rows{among}: rows of one id cannot be told apart")
    elif among:
        notify(f"no id of column {column!r} occurs twice{among}; the others were not looked at")


def _ids(parts: Sequence[tuple[Part, Path]]) -> Iterator[Any]:
    count = 0
    for _, path in parts:
        with open(path, "rb") as file:  # pyarrow opens no path that is not UTF-8
            for batch in pq.ParquetFile(file).iter_batches(BATCH_ROWS, columns=["id"]):
                for value in python_values(batch.column(0)):
                    if count == ROWS_LOOKED_AT:
                        return
                    count += 1
                    yield value


def _key(value: Any) -> Any:
    """What two equal ids share, and can be hashed."""
    return value if isinstance(value, str | bytes) else str(value)  # hash(-1) is hash(-2)
