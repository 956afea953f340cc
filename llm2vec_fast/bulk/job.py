"""A bulk job: corpus in, a folder of embeddings out, as often interrupted as it may be.

Three things run side by side: a thread reads the next shard, this thread encodes, a thread writes the last part. At
most three shards are in memory. A part counts once its line is in the journal; all else is redone."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from llm2vec_fast.bulk.checking import remember_checked
from llm2vec_fast.bulk.corpus import Corpus, Cursor, Shard, StopReadingError
from llm2vec_fast.bulk.duplicates import tell_duplicates
from llm2vec_fast.bulk.encoding import (
    Encoder,
    LoadEncoder,
    encode_texts,
    environment_of,
    load_encoder,
    placed,
    resolved_choices,
    with_choices,
)
from llm2vec_fast.bulk.folder import open_manifest, prepare
from llm2vec_fast.bulk.manifest import JOB_FOLDER, Manifest, Part, part_name, write_manifest
from llm2vec_fast.bulk.problems import ERRORS, keep_problems_of
from llm2vec_fast.bulk.progress import Meter, ProgressLine, counted
from llm2vec_fast.bulk.settings import EmbedSettings
from llm2vec_fast.bulk.sink import Sink
from llm2vec_fast.data.inputs import InputFile, find_inputs
from llm2vec_fast.data.reading import check_heads, decide_types
from llm2vec_fast.data.values import types_from_text, types_to_text
from llm2vec_fast.errors import ChangedError, InputError, OutputError
from llm2vec_fast.jobs.changes import changed_error, differences
from llm2vec_fast.jobs.environment import Environment
from llm2vec_fast.jobs.lock import only_job

POLL_SECONDS = 0.1
RESERVED_COLUMNS = ("id", "embedding")
Result = TypeVar("Result")


class JobStoppedError(Exception):
    """The job was told to stop; ``rows`` in ``parts`` finished parts are kept."""

    def __init__(self, parts: int, rows: int) -> None:
        super().__init__(f"stopped with {parts:,} parts ({rows:,} rows) finished")
        self.parts = parts
        self.rows = rows


@dataclass(frozen=True)
class Outcome:
    """What a job came to: numbers of the whole folder, and of this run."""

    rows: int
    bad_rows: int
    damaged: int
    tokens: int
    parts: int
    dimension: int
    rows_now: int = 0
    tokens_now: int = 0
    seconds: float = 0.0
    padding: float = 0.0
    already_finished: bool = False


def embed(
    patterns: Sequence[str],
    folder: Path,
    settings: EmbedSettings,
    *,
    load: LoadEncoder = load_encoder,
    stop: threading.Event | None = None,
    notify: Callable[[str], None] = lambda sentence: None,
) -> Outcome:
    """Embed a corpus into ``folder``, or go on where an earlier run of the same job ended.

    Args:
        patterns: files, folders and globs; see `find_inputs`.
        folder: gets part-00000.parquet, …, _manifest.json and, for rows left out, _errors.jsonl.
        settings: the model and all else that decides the embeddings.
        load: makes the encoder; not called for a finished job.
        stop: set it (from a signal handler, another thread) and the job ends after the batch at hand.
        notify: takes sentences for the user.

    Raises:
        JobStoppedError: ``stop`` was set.
        UserError: the inputs, the model, the settings or the disk do not allow the job; the message says what to do.
    """
    stop, folder = stop or threading.Event(), folder.expanduser()
    _require_free_names(settings)
    files = find_inputs(patterns, [folder], notify)
    prepare(folder)
    with only_job(folder / JOB_FOLDER, folder):
        manifest = open_manifest(folder, settings, files, notify, lambda found: _end_if_stopped(found, stop))
        if manifest.finished:
            outcome = _outcome(manifest, already_finished=True)
        else:
            for sentence in check_heads(files, settings.columns.asked, settings.csv, "embed"):
                notify(sentence)
            outcome = _run(folder, manifest, settings, files, load, stop, notify)
    if not outcome.rows:
        raise InputError(_nothing_embedded(folder, outcome))
    return outcome


def _end_if_stopped(manifest: Manifest, stop: threading.Event) -> None:
    if stop.is_set():
        raise JobStoppedError(len(manifest.parts), manifest.total("rows"))


def _require_free_names(settings: EmbedSettings) -> None:
    for name, count in Counter(settings.keep_columns).items():
        if name == settings.id_column == "id":
            raise InputError("column 'id' is the id, which the output has in any case: leave it out of --keep-columns")
        if name in RESERVED_COLUMNS:
            advice = ", or make it the id with --id-column id" if name == "id" else ""
            raise InputError(f"column {name!r} cannot be kept, the output has one of its own: rename it{advice}")
        if count > 1:
            raise InputError(f"--keep-columns names {name!r} {count} times: name it once")


def _run(
    folder: Path,
    manifest: Manifest,
    settings: EmbedSettings,
    files: Sequence[InputFile],
    load: LoadEncoder,
    stop: threading.Event,
    notify: Callable[[str], None],
) -> Outcome:
    if manifest.parts:
        rows = counted(manifest.total("rows"), "row")
        notify(f"going on after {counted(len(manifest.parts), 'finished part')} ({rows})")
    keep_problems_of(folder, manifest.parts)
    write_manifest(folder, manifest)
    settings = with_choices(settings, manifest.resolved)
    types = _types(manifest, settings, files, stop, notify)
    marks = (manifest.fingerprint[name] for name in ("model", "adapter"))
    encoder = load(placed(settings, *(mark and mark["path"] for mark in marks)))
    manifest.resolved = {**_resolve(folder, manifest, encoder, settings), **_as_recorded(types)}
    settings = with_choices(settings, manifest.resolved)
    here = _environment(manifest, environment_of(encoder, manifest.resolved), notify)
    write_manifest(folder, manifest)
    total_bytes = sum(file.bytes for file in files)
    done = (manifest.total(name) for name in ("input_bytes", "tokens", "rows", "bad_rows"))
    meter = Meter(total_bytes, *done)
    rows_before, started = manifest.total("rows"), time.monotonic()
    corpus = Corpus(files, settings.columns, types, settings.csv, manifest.resolved["rows_per_shard"], stop)
    try:
        with ProgressLine(meter) as progress:
            sink = Sink(folder, settings.output_dtype, _types_of_output(settings, types), here)
            _Pipeline(sink, manifest, settings, encoder, meter, progress, stop).run(corpus)
    except BaseException as error:
        with suppress(OutputError):  # the journal has it all: a full disk loses nothing
            _note(folder, manifest)
        if isinstance(error, _StopError | StopReadingError):
            raise JobStoppedError(len(manifest.parts), manifest.total("rows")) from None
        raise
    manifest.state = "finished"
    keep_problems_of(folder, manifest.parts)  # those of a part that was made again stand last
    _note(folder, manifest)
    if settings.id_column is not None:
        tell_duplicates(manifest.part_paths(folder), settings.id_column, notify)
    return _outcome(
        manifest,
        rows_now=manifest.total("rows") - rows_before,
        tokens_now=meter.tokens,
        seconds=time.monotonic() - started,
        padding=meter.padding,
    )


def _resolve(folder: Path, manifest: Manifest, encoder: Encoder, settings: EmbedSettings) -> dict[str, Any]:
    resolved = resolved_choices(encoder, settings)
    before = manifest.resolved.get("dimension", resolved["dimension"])
    if before != resolved["dimension"]:
        raise changed_error(folder, [f"dimension {before} -> {resolved['dimension']}"])
    return resolved


def _environment(manifest: Manifest, here: Environment, notify: Callable[[str], None]) -> int:
    """The place of what computes now in the manifest's list; says where something else computed finished parts."""
    before = {part.environment: None for part in manifest.parts.values()}
    changes = {change: None for place in before for change in differences(manifest.environments[place], here)}
    if changes:
        notify(f"{'; '.join(changes)}: new parts may differ from finished ones in their last bits")
    if here not in manifest.environments:
        manifest.environments.append(here)
    return manifest.environments.index(here)


def _note(folder: Path, manifest: Manifest) -> None:
    write_manifest(folder, manifest)
    remember_checked(folder, manifest)


def _types(
    manifest: Manifest,
    settings: EmbedSettings,
    files: Sequence[InputFile],
    stop: threading.Event,
    notify: Callable[[str], None],
) -> dict[str, pa.DataType]:
    """Of ids and kept columns, by their names in the input: those that the folder was started with."""
    if "arrow_types" in manifest.resolved:
        return types_from_text(manifest.resolved["arrow_types"])
    columns = settings.columns
    identifier = next(iter(columns.asked_ids), None)
    check = lambda: _end_if_stopped(manifest, stop)  # noqa: E731
    return decide_types(files, identifier, columns.asked_kept, settings.csv, check, notify)


def _as_recorded(types: dict[str, pa.DataType]) -> dict[str, Any]:
    """For people, and exactly."""
    return {"types": {name: str(kind) for name, kind in types.items()}, "arrow_types": types_to_text(types)}


def _types_of_output(settings: EmbedSettings, types: dict[str, pa.DataType]) -> dict[str, pa.DataType]:
    return {**types, "id": pa.string() if settings.id_column is None else types[settings.id_column]}


class _StopError(Exception):
    """The stop flag is set."""


class _Pipeline:
    """Read ahead, encode, write behind."""

    def __init__(
        self,
        sink: Sink,
        manifest: Manifest,
        settings: EmbedSettings,
        encoder: Encoder,
        meter: Meter,
        progress: ProgressLine,
        stop: threading.Event,
    ) -> None:
        self._manifest = manifest
        self._settings = settings
        self._width = manifest.resolved["dimension"]
        self._encoder = encoder
        self._meter = meter
        self._progress = progress
        self._stop = stop
        self._sink = sink
        self._written: Future[Part] | None = None

    def run(self, corpus: Corpus) -> None:
        """Every missing part, in order. Whatever ends it, the part that is being written is finished first."""
        with ThreadPoolExecutor(1, "read") as reader, ThreadPoolExecutor(1, "write") as writer:
            shards = _missing(corpus, dict(self._manifest.parts))
            try:
                upcoming = reader.submit(next, shards, None)
                while (found := self._wait(upcoming)) is not None:
                    shard, first_row = found
                    upcoming = reader.submit(next, shards, None)
                    embeddings, refused, tokens = self._encode(shard)
                    self._collect()
                    self._written = writer.submit(self._sink.write, shard, embeddings, refused, tokens, first_row)
            finally:
                reader.submit(corpus.close)
                self._collect()

    def _encode(self, shard: Shard) -> tuple[np.ndarray, dict[int, str], int]:
        before = self._meter.tokens
        bad_rows = sum(problem.rows for problem in shard.problems)
        self._meter.begin_shard(sum(map(len, shard.texts)), shard.input_bytes, bad_rows)
        embeddings, refused = np.empty((0, self._width), np.float32), {}
        if shard.texts:
            embeddings, refused = encode_texts(self._encoder, self._settings, self._width, shard.texts, self._on_batch)
        self._meter.end_shard()
        return embeddings, refused, self._meter.tokens - before

    def _on_batch(self, rows: int, tokens: int, padded_tokens: int) -> None:
        self._meter.batch(rows, tokens, padded_tokens)
        self._progress.update()
        if self._written is not None and self._written.done():
            self._collect()  # a full disk ends the job here, not after another part is embedded
        if self._stop.is_set():
            raise _StopError

    def _collect(self) -> None:
        """Wait for the part being written, if any."""
        written, self._written = self._written, None
        if written is not None:
            part = written.result()
            self._manifest.parts[part.index] = part

    def _wait(self, future: Future[Result]) -> Result:
        while not wait([future], POLL_SECONDS).done:
            if self._stop.is_set():
                raise _StopError
        return future.result()


def _missing(corpus: Corpus, finished: dict[int, Part]) -> Iterator[tuple[Shard, int]]:
    """The shards that no finished part holds, each with the rows of the corpus before it.

    Raises:
        ChangedError: a shard does not end where the finished part behind it begins: rows would be lost, or twice there.
    """
    cursor, index, row = Cursor(), 0, 0
    while True:
        part = finished.get(index)
        if part is not None:
            cursor, row = part.end, row + part.rows_read
        else:
            shard = corpus.read(index, cursor)
            if shard is None:
                return
            after = finished.get(index + 1)
            if after is not None and (after.start, after.first_row) != (shard.end, row + shard.rows_read):
                raise ChangedError(
                    f"{part_name(index)} would not hold the rows that it held, by another release's rules: embed again "
                    "into a new --output"
                )
            yield shard, row
            cursor, row = shard.end, row + shard.rows_read
        index += 1


def _outcome(manifest: Manifest, **now: Any) -> Outcome:
    totals = {name: manifest.total(name) for name in ("rows", "bad_rows", "damaged", "tokens")}
    return Outcome(**totals, parts=len(manifest.parts), dimension=manifest.resolved["dimension"], **now)


def _nothing_embedded(folder: Path, outcome: Outcome) -> str:
    if outcome.bad_rows or outcome.damaged:
        return f"no row could be embedded: {counted(outcome.bad_rows, 'row')} left out, {folder / ERRORS} says why"
    return "no row could be embedded: the input files hold no rows"
