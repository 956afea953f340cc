"""The queries of a file of pairs, the documents they are looked for among, and which belong together."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llm2vec_fast.data.inputs import InputFile
from llm2vec_fast.data.pairs import KnownPositives, PairColumns, identity, known_positives
from llm2vec_fast.data.reading import check_heads, texts_of
from llm2vec_fast.data.rows import Asked, LeftOut, Problem
from llm2vec_fast.data.tables import Rows, all_rows
from llm2vec_fast.errors import UserError
from llm2vec_fast.jobs.files import json_bytes, replacing
from llm2vec_fast.mining.settings import MiningSettings


@dataclass
class MiningTexts:
    """What is searched, and among what.

    Attributes:
        rows: those of the file that have a query and a document, as they are there.
        queries: their queries.
        documents: every document once, those of the pairs first.
        positives: which documents are a row's own.
        known: the ids of what is known to suit each row's query, and so none of its negatives.
        document_ids: (documents,) int64.
    """

    rows: Rows
    queries: list[str]
    documents: list[str]
    positives: list[list[int]]
    known: KnownPositives
    document_ids: np.ndarray


def read_mining_texts(
    pairs: Sequence[InputFile],
    corpora: Sequence[InputFile],
    settings: MiningSettings,
    listing: Path,
    notify: Callable[[str], None] = lambda sentence: None,
) -> MiningTexts:
    """Read the pairs, and further documents.

    Args:
        listing: gets a line for each row that is left out, if there are any.
        notify: takes a sentence about these.

    Raises:
        UserError: a file cannot be read, or lacks a column, or there is no pair.
    """
    csv, columns = (
        settings.encoder.csv,
        PairColumns(settings.query_column, settings.positive_column, (), settings.id_column),
    )
    asked = columns.asked("--{}-column")
    for sentence in check_heads(pairs, asked, csv):
        notify(sentence)
    found, problems = all_rows(pairs, asked, csv)
    total = len(found.places) + len(problems)
    some, kept = [], []
    for i, values in enumerate(zip(*(found.column(each.name) for each in asked), strict=True)):
        pair, wrong = columns.pair(values)
        if wrong is None:
            some.append(pair)
            kept.append(i)
        else:
            name, row, line = found.places[i]
            problems.append(Problem(name, row, None, wrong, line=line))
    order = {file.name: number for number, file in enumerate(pairs)}
    problems.sort(key=lambda problem: (order[problem.file], problem.row))
    more, others = _documents(corpora, settings, notify)
    _tell(total + len(more) + len(others), [*problems, *others], listing, notify)
    if not some:
        why = f" (the first, {problems[0].place}: {problems[0].reason})" if problems else ""
        raise UserError(
            f"{pairs[0].shown} has no row with a text in {settings.query_column!r} and in "
            f"{settings.positive_column!r}: check the columns{why}"
        )
    documents: dict[int, str] = {}
    for text in (*(text for pair in some for text in pair.positives), *more):
        documents.setdefault(identity(text), text)
    places = {name: place for place, name in enumerate(documents)}
    own = [pair.positives for pair in some]
    known = known_positives((pair.query, texts, pair.name) for pair, texts in zip(some, own, strict=True))
    return MiningTexts(
        rows=found.kept(kept),
        queries=[pair.query for pair in some],
        documents=list(documents.values()),
        positives=[[places[identity(text)] for text in texts] for texts in own],
        known=known,
        document_ids=np.array([known.of_text(text) for text in documents.values()], np.int64),
    )


def _documents(
    corpora: Sequence[InputFile], settings: MiningSettings, notify: Callable[[str], None]
) -> tuple[list[str], list[Problem]]:
    if not corpora:
        return [], []
    asked = [Asked(settings.text_column, "--text-column", text=True)]
    for sentence in check_heads(corpora, asked, settings.encoder.csv):
        notify(sentence)
    texts, problems = [], []
    for found in (found for file in corpora for found in texts_of(file, asked[0], settings.encoder.csv)):
        if isinstance(found, Problem):
            problems.append(found)
        else:
            texts.append(found)
    return texts, problems


def _tell(rows: int, problems: Sequence[Problem], listing: Path, notify: Callable[[str], None]) -> None:
    """Say which rows are left out, and list them all."""
    listing.unlink(missing_ok=True)  # of an earlier run
    if not problems:
        return
    left = LeftOut(rows)
    left.add(problems)
    with replacing(listing) as file:
        for problem in problems:
            file.write(json_bytes(problem.as_json()) + b"\n")
    notify(left.sentence(str(listing)))


def write_texts(path: Path, texts: Sequence[str]) -> None:
    """One text a line, with its number as ``id``, for a bulk job to embed; nothing where that is done."""
    if path.exists():
        return
    with replacing(path) as file:
        for number, text in enumerate(texts):
            file.write(json.dumps({"id": str(number), "text": text}).encode() + b"\n")
