"""The queries of a file of pairs, the documents they are looked for among, and which belong together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llm2vec_fast.errors import UserError
from llm2vec_fast.jobs.files import replacing
from llm2vec_fast.mining.rows import Rows, read_rows_of
from llm2vec_fast.mining.settings import MiningSettings
from llm2vec_fast.training.packing import identity
from llm2vec_fast.training.pairs import name_in, same_things, texts_in
from llm2vec_fast.training.texts import read_texts


@dataclass
class MiningTexts:
    """What is searched, and among what.

    Attributes:
        rows: those of the file that have a query and a document, as they are there.
        queries: their queries.
        documents: every document once, those of the pairs first.
        positives: which documents are a row's own.
        things: (rows,) int64; a document is no negative of a row of the same thing.
        document_things: (documents,) int64.
    """

    rows: Rows
    queries: list[str]
    documents: list[str]
    positives: list[list[int]]
    things: np.ndarray
    document_things: np.ndarray


def read_mining_texts(pairs: Path, corpora: Sequence[str], settings: MiningSettings) -> MiningTexts:
    """Read the pairs, and further documents.

    Raises:
        UserError: a file cannot be read, or lacks a column, or there is no pair.
    """
    found = read_rows_of(pairs, texts=(settings.query_column, settings.positive_column))
    for column in (settings.query_column, settings.positive_column, settings.id_column):
        if column is not None and column not in found.names:
            raise UserError(f"{pairs} has no column {column!r}: there are {', '.join(found.names)}")
    queries = [next(texts_in(value), "") for value in found.column(settings.query_column)]
    own = [list(texts_in(value)) for value in found.column(settings.positive_column)]
    kept = [i for i, (query, texts) in enumerate(zip(queries, own, strict=True)) if query and texts]
    if not kept:
        raise UserError(
            f"{pairs} has no row with a text in {settings.query_column!r} and in {settings.positive_column!r}: check "
            "the columns"
        )
    rows, queries, own = found.kept(kept), [queries[i] for i in kept], [own[i] for i in kept]
    more = read_texts(list(corpora), settings.text_column)["text"] if corpora else []
    documents: dict[int, str] = {}
    for text in (*(text for texts in own for text in texts), *more):
        documents.setdefault(identity(text), text)
    places = {name: place for place, name in enumerate(documents)}
    ids = [None] * len(kept) if settings.id_column is None else rows.column(settings.id_column)
    things = same_things(queries, own, [name_in(value) for value in ids])
    return MiningTexts(
        rows=rows,
        queries=queries,
        documents=list(documents.values()),
        positives=[[places[identity(text)] for text in texts] for texts in own],
        things=np.array([things.of_row(i) for i in range(len(kept))], np.int64),
        document_things=np.array([things.of_text(text) for text in documents.values()], np.int64),
    )


def write_texts(path: Path, texts: Sequence[str]) -> None:
    """One text a line, with its number as ``id``, for a bulk job to embed; nothing where that is done."""
    if path.exists():
        return
    with replacing(path) as file:
        for number, text in enumerate(texts):
            file.write(json.dumps({"id": str(number), "text": text}).encode() + b"\n")
