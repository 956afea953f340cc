"""What a folder of embeddings holds, for tests."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


def parts(folder: Path) -> dict[str, bytes]:
    """The parts by name, byte for byte."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("part-*.parquet"))}


def table(folder: Path) -> pa.Table:
    """All parts in order."""
    return pa.concat_tables([pq.read_table(path) for path in sorted(folder.glob("part-*.parquet"))])


def ids(folder: Path) -> list[str]:
    return table(folder)["id"].to_pylist()


def embeddings(folder: Path) -> np.ndarray:
    return np.stack(table(folder)["embedding"].to_numpy())


def errors(folder: Path) -> list[dict[str, Any]]:
    path = folder / "_errors.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "_manifest.json").read_text())


def flip_a_bit(path: Path) -> None:
    """In the middle of a file, its size and its times as they were."""
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=times)
