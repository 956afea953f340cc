"""Exact search over a folder of embeddings: every part is read once, a slice at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llm2vec_fast.bulk.encoding import LoadEncoder, load_encoder, placed, with_choices
from llm2vec_fast.bulk.fingerprint import fingerprint
from llm2vec_fast.bulk.manifest import MANIFEST, Manifest, Part, read_manifest
from llm2vec_fast.bulk.settings import EmbedSettings
from llm2vec_fast.data.values import python_values, shown_value
from llm2vec_fast.errors import ChangedError, InputError, NonFiniteEmbeddingError, OutputError

SLICE_BYTES = 32 << 20  # of embeddings scored at once


@dataclass(frozen=True)
class Hit:
    """A row found: its id, the cosine to the question (-1 to 1), and the columns kept with `--keep-columns`.

    Ids and values are as JSON has them: dates and decimals are strings, bytes the text that they are.
    """

    id: Any
    score: float
    columns: dict[str, Any]


def search(
    folder: Path,
    questions: Sequence[str],
    *,
    top_k: int = 5,
    instruction: str | None = None,
    model: str | None = None,
    adapter: str | None = None,
    revision: str | None = None,
    adapter_revision: str | None = None,
    device: str | None = None,
    load: LoadEncoder = load_encoder,
    notify: Callable[[str], None] = lambda sentence: None,
) -> list[list[Hit]]:
    """The ``top_k`` rows of highest cosine for each question, best first.

    The model and its settings are those of the folder's manifest; ``model`` and ``adapter`` tell where they are now,
    if they moved, ``revision`` and ``adapter_revision`` at which commit of a hub repository, if not that of the folder.
    ``instruction`` is the questions' own, the documents' is not used. The folder may be a stranger's: what it names is
    loaded from this machine only, and no code that comes with it is run.

    Raises:
        InputError: the folder holds no embeddings, or a question is empty.
        ChangedError: the model is not the one that the folder was made with, or is not where it was.
        OutputError: a part is damaged.
    """
    folder = folder.expanduser()
    manifest = _readable(folder, questions, notify)
    settings = placed(
        replace(with_choices(EmbedSettings.from_json(manifest.settings), manifest.resolved), device=device),
        model or _named(folder, manifest, "model", notify),
        adapter or _named(folder, manifest, "adapter", notify),
        revision,
        adapter_revision,
    )
    _require_same_model(manifest, settings, folder)
    queries = load(settings).encode(
        list(questions),
        instruction=instruction,
        normalize=True,
        truncate_dim=settings.truncate_dim,
        convert_to_numpy=True,
    )
    bad = np.flatnonzero(~np.isfinite(queries).all(axis=1))
    if len(bad):
        raise NonFiniteEmbeddingError(f"the embedding of the question {questions[bad[0]]!r} is not finite: change it")
    scores, places = _best(folder, manifest, queries.astype(np.float32), top_k)
    return _fetch(folder, manifest, settings, scores, places)


def _readable(folder: Path, questions: Sequence[str], notify: Callable[[str], None]) -> Manifest:
    manifest = read_manifest(folder)
    if manifest is None:
        raise InputError(f"{folder} has no {MANIFEST}: give a folder that `llm2vec-fast embed` wrote")
    if not manifest.total("rows"):
        raise InputError(f"{folder} holds no embeddings yet: run its `llm2vec-fast embed` command to the end")
    if any(not question.strip() for question in questions):
        raise InputError("a question is empty: give some words to search for")
    if not manifest.finished:
        notify(f"{folder} is not finished: searching the {manifest.total('rows'):,} rows it holds so far")
    return manifest


def _named(folder: Path, manifest: Manifest, name: str, notify: Callable[[str], None]) -> str | None:
    """The path that the manifest names, which is never taken for a name on the hub; None where there is none."""
    mark = manifest.fingerprint[name]
    if mark is None:
        return None
    path = Path(mark["path"])
    if not path.is_absolute() or not path.exists():
        raise ChangedError(f"{folder} names the {name} {path}, which is not there: say where it is with --{name}")
    notify(f"the {name} is {path}, as {folder / MANIFEST} says")
    return str(path)


def _require_same_model(manifest: Manifest, settings: EmbedSettings, folder: Path) -> None:
    found = fingerprint(settings.model, settings.adapter, known=manifest.fingerprint, hub=settings.hub)
    for name, mark in found.items():
        made_with = manifest.fingerprint[name]
        if (mark and mark["sha256"]) != (made_with and made_with["sha256"]):
            raise ChangedError(
                f"{folder} was embedded with another {name} than {(mark or {}).get('path', 'none')} is now "
                f"({(made_with or {}).get('path', 'none')} then): give the same one with --model or --adapter"
            )


def _best(folder: Path, manifest: Manifest, queries: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores (Q, k) and places (Q, k, 2) of the best rows; a place is the part's number and the row in it."""
    scores = np.empty((len(queries), 0), np.float32)
    places = np.empty((len(queries), 0, 2), np.int64)
    for part, row, embeddings in _slices(folder, manifest):
        norms = np.linalg.norm(embeddings, axis=1)
        found = queries @ embeddings.T / np.maximum(norms, np.finfo(np.float32).tiny)
        rows = np.arange(row, row + len(embeddings))
        new = np.broadcast_to(np.stack([np.full_like(rows, part.index), rows], axis=1), (len(queries), len(rows), 2))
        scores, places = np.concatenate([scores, found], axis=1), np.concatenate([places, new], axis=1)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :top_k]
        scores = np.take_along_axis(scores, order, axis=1)
        places = np.take_along_axis(places, order[..., None], axis=1)
    return scores, places


def _slices(folder: Path, manifest: Manifest) -> Iterator[tuple[Part, int, np.ndarray]]:
    """Embeddings (n, d) float32 with the part they are of and their first row in it."""
    rows = max(1, SLICE_BYTES // (4 * manifest.resolved["dimension"]))
    for part, path in manifest.part_paths(folder):
        row = 0
        for batch in _batches(path, rows, ["embedding"]):
            column = batch.column(0)
            values = column.flatten().to_numpy(zero_copy_only=False)
            embeddings = values.astype(np.float32, copy=False).reshape(len(column), -1)
            yield part, row, embeddings
            row += len(column)


def _batches(path: Path, rows: int, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    try:
        with open(path, "rb") as file:  # pyarrow opens no path that is not UTF-8
            yield from pq.ParquetFile(file).iter_batches(rows, columns=list(columns))
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise OutputError(f"{path} cannot be read ({reason}): its embed command makes it again, alone") from error


def _fetch(
    folder: Path, manifest: Manifest, settings: EmbedSettings, scores: np.ndarray, places: np.ndarray
) -> list[list[Hit]]:
    """Read the ids and kept columns of the rows found, and of no others."""
    columns = ["id", *settings.keep_columns]
    found: dict[tuple[int, int], dict[str, Any]] = {}
    for index in np.unique(places[..., 0]):
        rows = np.unique(places[places[..., 0] == index][:, 1])
        path = folder / manifest.parts[int(index)].name
        found |= {(int(index), row): value for row, value in _rows_of(path, rows, columns)}
    hits = []
    for question_scores, question_places in zip(scores, places, strict=True):
        values = [dict(found[(int(part), int(row))]) for part, row in question_places]
        hits.append([Hit(v.pop("id"), float(s), v) for v, s in zip(values, question_scores, strict=True)])
    return hits


def _rows_of(path: Path, rows: np.ndarray, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    first = 0
    for batch in _batches(path, 1024, columns):
        wanted = rows[(rows >= first) & (rows < first + batch.num_rows)]
        some = batch.take(pa.array(wanted - first))
        values = [map(shown_value, python_values(column)) for column in some.columns]
        for row, *found in zip(wanted.tolist(), *values, strict=True):
            yield row, dict(zip(some.schema.names, found, strict=True))
        first += batch.num_rows
