"""A mining job: pairs in, pairs with hard negatives out, as often interrupted as it may be.

Beside the output stands a folder while the job is under way: the texts, their embeddings as `bulk` writes them, and
what was found for each block of queries. Finished parts of either are not made again.
"""

from __future__ import annotations

import json
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llm2vec_fast.bulk.encoding import LoadEncoder, load_encoder
from llm2vec_fast.bulk.folder import remove_embeddings
from llm2vec_fast.bulk.job import embed
from llm2vec_fast.bulk.manifest import read_manifest
from llm2vec_fast.data.inputs import InputFile, find_inputs
from llm2vec_fast.data.tables import Rows, TableRows
from llm2vec_fast.data.writing import Added, write_rows
from llm2vec_fast.errors import OutputError
from llm2vec_fast.jobs.changes import changed_error
from llm2vec_fast.jobs.files import LEFTOVERS, is_leftover, remove_own, replace_json, replacing, sha256_of
from llm2vec_fast.jobs.lock import HOLDER, LOCK, only_job
from llm2vec_fast.jobs.typed import of_type
from llm2vec_fast.mining.search import Found, find_negatives
from llm2vec_fast.mining.settings import MiningSettings
from llm2vec_fast.mining.texts import MiningTexts, read_mining_texts, write_texts

QUERIES_AT_ONCE = 1024
_JOB, _INPUTS = "mining.json", "inputs"
_SIDES = ("queries", "documents")
_NEGATIVES, _SCORES, _POSITIVE = "negative", "negative_score", "positive_score"
WRITERS = (".jsonl", ".parquet")


class MiningStoppedError(Exception):
    """The job was told to stop; what is finished is kept."""


@dataclass(frozen=True)
class Outcome:
    """What a job came to: rows written, those among them with no negative at all, and negatives in all."""

    rows: int
    without: int
    negatives: int


def mine(
    pairs: Sequence[str],
    output: Path,
    settings: MiningSettings,
    corpora: Sequence[str] = (),
    *,
    load: LoadEncoder = load_encoder,
    stop: threading.Event | None = None,
    notify: Callable[[str], None] = lambda sentence: None,
) -> Outcome:
    """Find hard negatives for every pair among all documents, or go on where an earlier run of the same job ended.

    A document is a row's hard negative if its cosine to the query is below a share of that of the row's own document
    (Moreira et al., 2024, arXiv:2407.15831), and if it is not known to suit it (`data.pairs.known_positives`). Of those
    the nearest are taken. The search is exact.

    Args:
        pairs: files, folders and globs of any format but txt; see `find_inputs`.
        output: jsonl or parquet: the rows that have a query and a document, with all their columns as they are, and
            ``negative`` (a list, nearest first), ``negative_score`` and ``positive_score`` in the place of columns of
            those names. Rows that have none are listed in a file beside it, which ends in .errors.jsonl.
        settings: the encoder and all else that decides the result.
        corpora: files, folders and globs of further documents; those of the pairs are searched in any case.
        load: makes the encoder.
        stop: set it and the job ends soon.
        notify: takes sentences for the user.

    Raises:
        MiningStoppedError, JobStoppedError: ``stop`` was set.
        UserError: the inputs, the model, the settings or the disk do not allow the job; the message says what to do.
    """
    stop, output = stop or threading.Event(), output.expanduser()
    if output.suffix.lower() not in WRITERS:
        raise OutputError(f"{output} is of a format that its name does not tell: end it in {' or '.join(WRITERS)}")
    folder = output.with_name(f"{output.name}.mining")
    listing = output.with_name(f"{output.name}.errors.jsonl")
    files = find_inputs(pairs, [output, folder, listing], notify)
    more = find_inputs(corpora, [output, folder, listing], notify) if corpora else []
    _prepare(folder, output)
    with _working_in(folder, output):
        _require_absent(output)  # a job that had the lock until now may have written it
        _open(folder, [*files, *more], settings)
        texts = read_mining_texts(files, more, settings, listing, notify)
        # What does not fit a parquet file is told before the work is done.
        rows = TableRows(texts.rows.table(), texts.rows.places) if _is_parquet(output) else texts.rows
        notify(f"{len(texts.queries):,} queries, {len(texts.documents):,} documents")
        instructions = settings.encoder.instruction, settings.documents_instruction
        queries, documents = (
            _embedded(folder, name, some, settings, instruction, load, stop, notify)
            for name, some, instruction in zip(_SIDES, (texts.queries, texts.documents), instructions, strict=True)
        )
        found = _search(folder, queries, documents, texts, settings, stop)
        return _write(output, rows, texts, found)


def _prepare(folder: Path, output: Path) -> None:
    """Make the folder ready to be locked; one with somebody else's files is refused."""
    _require_absent(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in folder.iterdir() if not is_leftover(path)}
    except OSError as error:
        raise OutputError(f"{folder} cannot be used: {error.strerror}") from error
    foreign = sorted(names - {LOCK, HOLDER})
    if foreign and _JOB not in names:
        raise OutputError(f"{folder} has other files ({foreign[0]}, …): give another --output")


def _require_absent(output: Path) -> None:
    if output.exists():
        raise OutputError(f"{output} exists already: delete it, or give another --output")


@contextmanager
def _working_in(folder: Path, output: Path) -> Iterator[None]:
    """Hold the folder; it goes once the work is done, or ended before a part was finished: it would be in the way."""
    held = False
    try:
        with only_job(folder, output):
            held = True
            try:
                yield
            except BaseException:
                if not any(folder.glob("*/part-*.parquet")):
                    with suppress(OSError):
                        _remove_work(folder)
                raise
            _remove_work(folder)
    finally:
        if held and not (folder / _JOB).exists():
            with suppress(OSError):
                remove_own(folder, (LOCK,))


def _remove_work(folder: Path) -> None:
    """Remove the job's own files; what else somebody put there stays, with the folder."""
    for name in _SIDES:
        remove_embeddings(folder / name)
    remove_own(folder, (_JOB, *(f"{name}.*" for name in _SIDES), "found-*.npz", LEFTOVERS))


def _is_parquet(output: Path) -> bool:
    return output.suffix.lower() == ".parquet"


def _open(folder: Path, files: Sequence[InputFile], settings: MiningSettings) -> None:
    """Refuse a folder that another job left."""
    asked = {**settings.as_json(), _INPUTS: [sha256_of(Path(file.path)) for file in files]}
    asked = json.loads(json.dumps(asked))
    path = folder / _JOB
    if not path.exists():
        replace_json(path, asked)
        return
    try:
        before = of_type(dict, json.loads(path.read_text(encoding="utf-8")), "it")
    except (OSError, ValueError) as error:
        raise OutputError(f"{path} is damaged ({error}): delete {folder} and mine again") from error
    changes = [
        "other files or other contents" if name == _INPUTS else f"{name} {before.get(name)} -> {new}"
        for name, new in asked.items()
        if before.get(name) != new
    ]
    if changes:
        raise changed_error(folder, changes)


def _embedded(
    folder: Path,
    name: str,
    texts: Sequence[str],
    settings: MiningSettings,
    instruction: str | None,
    load: LoadEncoder,
    stop: threading.Event,
    notify: Callable[[str], None],
) -> np.ndarray:
    """(texts, d) float32 of length 1, mapped from a file; NaN where a text could not be embedded."""
    write_texts(folder / f"{name}.jsonl", texts)
    encoder = replace(
        settings.encoder, instruction=instruction, normalize=True, text_column="text", id_column="id", keep_columns=()
    )
    embed([str(folder / f"{name}.jsonl")], folder / name, encoder, load=load, stop=stop, notify=notify)
    return _gathered(folder / name, folder / f"{name}.npy", len(texts))


def _gathered(embeddings: Path, path: Path, count: int) -> np.ndarray:
    """The parts of a bulk job as one array, in the order of the texts."""
    manifest = read_manifest(embeddings)
    assert manifest is not None, embeddings
    shape = (count, manifest.resolved["dimension"])
    rows = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    rows[:] = np.nan
    for _, part in manifest.part_paths(embeddings):
        with open(part, "rb") as file:  # pyarrow opens no path that is not UTF-8
            for batch in pq.ParquetFile(file).iter_batches(QUERIES_AT_ONCE, columns=["id", "embedding"]):
                places = np.array([int(x) for x in batch.column(0).to_pylist()], np.int64)
                rows[places] = batch.column(1).flatten().to_numpy(zero_copy_only=False).reshape(len(places), -1)
    rows.flush()
    return np.load(path, mmap_mode="r")


def _search(
    folder: Path,
    queries: np.ndarray,
    documents: np.ndarray,
    texts: MiningTexts,
    settings: MiningSettings,
    stop: threading.Event,
) -> list[Found]:
    def check() -> None:
        if stop.is_set():
            raise MiningStoppedError

    found = []
    for first in range(0, len(queries), QUERIES_AT_ONCE):
        path = folder / f"found-{first:010d}.npz"
        result = _found_before(path)
        if result is None:
            block = queries[first : first + QUERIES_AT_ONCE]
            result = find_negatives(block, documents, texts, first, settings, after_slice=check)
            with replacing(path) as file:
                np.savez(file, places=result.places, scores=result.scores, positives=result.positives)
        found.append(result)
    return found


def _found_before(path: Path) -> Found | None:
    """What an earlier run found for a block of queries; None where there is none, or it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as parts:  # a zip: each array has its checksum
            return Found(parts["places"], parts["scores"], parts["positives"])
    except (OSError, ValueError, KeyError, EOFError, BadZipFile, zlib.error):
        return None


def _write(output: Path, rows: Rows, texts: MiningTexts, found: Sequence[Found]) -> Outcome:
    """Rows with their negatives, the file whole or not there."""
    negatives, scores, own = [], [], []
    for block in found:
        for places, values, positive in zip(block.places, block.scores, block.positives, strict=True):
            some = places >= 0
            negatives.append([texts.documents[i] for i in places[some]])
            scores.append([round(float(x), 6) for x in values[some]])
            own.append(None if np.isnan(positive) else round(float(positive), 6))
    added = {
        _NEGATIVES: Added(negatives, pa.list_(pa.string())),
        _SCORES: Added(scores, pa.list_(pa.float64())),
        _POSITIVE: Added(own, pa.float64()),
    }
    with replacing(output) as file:
        write_rows(file, rows, added, parquet=_is_parquet(output))
    return Outcome(len(negatives), sum(not some for some in negatives), sum(map(len, negatives)))
