"""Parts of the output: Parquet files of ids, kept columns and embeddings, and _errors.jsonl for rows left out."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llm2vec_fast.bulk.corpus import Shard
from llm2vec_fast.bulk.manifest import Part, part_name, record_part
from llm2vec_fast.bulk.problems import append_problems
from llm2vec_fast.data.rows import Problem
from llm2vec_fast.data.values import shown_value, to_array
from llm2vec_fast.jobs.files import replacing

ROWS_PER_GROUP = 8192
MAX_FLOAT16 = float(np.finfo(np.float16).max)


class Sink:
    """Writes finished shards into ``folder``; one call at a time, from any thread.

    Args:
        types: of the id and of kept columns, by the names they have in the output.
        environment: the place of what computes in the manifest's list.
    """

    def __init__(self, folder: Path, output_dtype: str, types: Mapping[str, pa.DataType], environment: int) -> None:
        self._folder = folder
        self._types = types
        self._environment = environment
        self._dtype = np.dtype(output_dtype)

    def write(
        self, shard: Shard, embeddings: np.ndarray, refused: Mapping[int, str], tokens: int, first_row: int
    ) -> Part:
        """Write a part, its bad rows and its entry in the journal, in this order: only the entry makes it count.

        Args:
            shard: the rows.
            embeddings: (N, d) float32, a row a text of the shard; rows that are not finite are left out.
            refused: the reason, by their place, for texts that the encoder raised for.
            tokens: tokens that the model saw.
            first_row: rows of the corpus before this shard.

        Raises:
            OutputError: the disk is full, or the folder cannot be written.
        """
        good, problems = _split(shard, embeddings, refused, self._dtype)
        name = part_name(shard.index)
        size, digest = self._write_table(self._folder / name, _table(shard, embeddings, good, self._dtype, self._types))
        errors_digest = append_problems(self._folder, shard.index, problems)
        part = Part(
            index=shard.index,
            name=name,
            first_row=first_row,
            rows_read=shard.rows_read,
            rows=int(good.sum()),
            bad_rows=sum(problem.rows for problem in problems),
            damaged=sum(problem.damage for problem in problems),
            tokens=tokens,
            input_bytes=shard.input_bytes,
            bytes=size,
            sha256=digest,
            errors_sha256=errors_digest,
            environment=self._environment,
            start=shard.start,
            end=shard.end,
        )
        record_part(self._folder, part)
        return part

    def _write_table(self, path: Path, table: pa.Table) -> tuple[int, str]:
        with replacing(path) as file:
            hashing = HashingFile(file)
            pq.write_table(
                table,
                pa.PythonFile(hashing, mode="w"),
                row_group_size=ROWS_PER_GROUP,
                compression={name: "none" if name == "embedding" else "zstd" for name in table.column_names},
                use_dictionary=False,
                write_statistics=False,
            )
        return hashing.size, hashing.digest.hexdigest()


class HashingFile:
    """A file that is only appended to, and hashed on the way."""

    closed = False

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.size = 0

    def write(self, data: Any) -> int:
        self.digest.update(data)
        self.size += len(data)
        self._file.write(data)
        return len(data)

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        """The owner of the file closes it, once it is synced."""


def _split(
    shard: Shard, embeddings: np.ndarray, refused: Mapping[int, str], dtype: np.dtype[Any]
) -> tuple[np.ndarray, list[Problem]]:
    """Which rows can be written (N bools), and all the shard's problems."""
    reasons = {
        "the embedding is not finite, in float32 too": ~np.isfinite(embeddings).all(axis=1),
        "the model has no token of the text to pool": (embeddings == 0).all(axis=1),
    }
    if dtype == np.float16:
        too_large = (np.abs(embeddings) > MAX_FLOAT16).any(axis=1)
        reasons["the embedding is too large for float16: use --output-dtype float32, or --normalize"] = too_large
    good = ~np.any(list(reasons.values()), axis=0)
    problems = list(shard.problems)
    for place in np.flatnonzero(~good):
        reason = refused.get(int(place)) or next(reason for reason, bad in reasons.items() if bad[place])
        name, row, line = shard.places[place]
        problems.append(Problem(name, row, shown_value(shard.ids[place]), reason, line=line))
    return good, problems


def _table(
    shard: Shard,
    embeddings: np.ndarray,
    good: np.ndarray,
    dtype: np.dtype[Any],
    types: Mapping[str, pa.DataType],
) -> pa.Table:
    mask = pa.array(good)
    values = np.ascontiguousarray(embeddings[good].astype(dtype)).reshape(-1)
    columns = {name: to_array(kept, types[name]).filter(mask) for name, kept in {"id": shard.ids, **shard.kept}.items()}
    columns["embedding"] = pa.FixedSizeListArray.from_arrays(pa.array(values), embeddings.shape[1])
    return pa.table(columns)
