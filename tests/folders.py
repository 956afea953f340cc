"""What a folder of embeddings holds, for tests."""

from __future__ import annotations

import json
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
    path = folder / "errors.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())
