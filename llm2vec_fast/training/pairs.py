"""Training pairs: files of queries with their documents and hard negatives, each file a data set of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value, concatenate_datasets

from llm2vec_fast.data.delimited import Csv
from llm2vec_fast.data.inputs import InputFile, find_inputs
from llm2vec_fast.data.pairs import PairColumns, known_positives
from llm2vec_fast.data.reading import check_heads, rows_of
from llm2vec_fast.errors import UserError
from llm2vec_fast.training.arguments import NEGATIVE_COLUMNS, ContrastiveArguments
from llm2vec_fast.training.sampling import NO_ROW, DrawnAnew
from llm2vec_fast.training.texts import PLACE, cached, notifier, places_of, tell_left_out, whole_rows

_QUERY, _POSITIVE, _NEGATIVES, _NAME = "query", "positives", "negatives", "name"
_AT_ONCE = 1000  # rows


class Pairs(DrawnAnew):
    """Queries, each with a document drawn of its own and hard negatives drawn of its own: others in every epoch.

    What is drawn follows from the seed, the epoch and the row alone.

    Attributes:
        sizes: rows of each entry, which are numbered one entry after the other.
    """

    def __init__(self, files: Sequence[str], arguments: ContrastiveArguments, *, validation: bool = False) -> None:
        """Read the files; a folder or a glob is one set of rows, as a file is.

        Raises:
            UserError: a file cannot be read, lacks a column, or holds no row with a query and a document.
        """
        super().__init__()
        self._query_instructions = _instructions("query_instruction", files, arguments, validation)
        self._document_instructions = _instructions("document_instruction", files, arguments, validation)
        self._seed, self._count = arguments.seed_of_data, arguments.negatives
        first = arguments.process_index == 0
        listings = [arguments.listing(validation=validation, number=i) if first else None for i in range(len(files))]
        notify = notifier(arguments)
        read = [_read(name, arguments, listing, notify) for name, listing in zip(files, listings, strict=True)]
        self.sizes = [len(rows) for rows in read]
        self._rows = concatenate_datasets(read)
        self._known = known_positives(_marks(self._rows))
        self._ends = np.cumsum(self.sizes)

    def __len__(self) -> int:
        return len(self._rows)

    def texts(self) -> Iterator[tuple[str, str]]:
        """All queries, documents and hard negatives, each with its instruction."""
        for index, row in enumerate(self._rows):
            file = int(np.searchsorted(self._ends, index, side="right"))
            yield self._query_instructions[file], row[_QUERY]
            for text in (*row[_POSITIVE], *row[_NEGATIVES]):
                yield self._document_instructions[file], text

    def __getitem__(self, index: int) -> dict[str, Any] | None:
        """``query``, ``positive`` and ``negatives`` as (instruction, text) pairs, ``ids`` of the documents, those of
        further ones ``known`` to suit the query, and ``row``; None for `NO_ROW`."""
        if index == NO_ROW:
            return None
        row, file = self._rows[index], int(np.searchsorted(self._ends, index, side="right"))
        rng = np.random.default_rng([self._seed, self.epoch, index])
        positive = row[_POSITIVE][int(rng.integers(len(row[_POSITIVE])))]
        count = min(self._count, len(row[_NEGATIVES]))
        drawn = rng.choice(len(row[_NEGATIVES]), count, replace=False).tolist() if count else []
        negatives = [row[_NEGATIVES][i] for i in drawn]
        of_documents = self._document_instructions[file]
        ids = [self._known.of_text(text) for text in (positive, *negatives)]
        return {
            "query": (self._query_instructions[file], row[_QUERY]),
            "positive": (of_documents, positive),
            "negatives": [(of_documents, text) for text in negatives],
            "ids": ids,
            "known": [x for x in self._known.of_row(index) if x != ids[0]],
            "row": index,
        }


def _read(entry: str, arguments: ContrastiveArguments, listing: Path | None, notify: Callable[[str], None]) -> Dataset:
    """One entry's rows: ``query``, ``positives`` and ``negatives`` (lists) and ``name`` (None for none)."""
    files = find_inputs([entry], [Path(arguments.output_dir)], notify)
    columns = PairColumns(
        arguments.query_column,
        arguments.positive_column,
        tuple(arguments.negative_columns),
        arguments.id_column,
        negatives_required=arguments.negative_columns != list(NEGATIVE_COLUMNS),
    )
    for sentence in check_heads(files, columns.asked("{}_column"), arguments.csv):
        notify(sentence)
    texts = Value("string")
    features = Features(
        {_QUERY: texts, _POSITIVE: List(texts), _NEGATIVES: List(texts), _NAME: texts, **PLACE}
    )  # fmt: skip
    found = cached(_pairs, features, files=tuple(files), columns=columns, csv=arguments.csv)
    first = tell_left_out(found, listing, notify)
    rows = whole_rows(found)
    if not len(rows):
        why = f" (the first, {first.place}: {first.reason})" if first else ""
        raise UserError(
            f"{entry} has no row with a text in {columns.query!r} and in {columns.positive!r}: check the columns{why}"
        )
    return rows.select_columns([_QUERY, _POSITIVE, _NEGATIVES, _NAME])


def _marks(rows: Dataset) -> Iterator[tuple[str, list[str], str | None]]:
    """Query, documents and name of each row; many rows at a time, as one alone takes ten times as long."""
    names = [_QUERY, _POSITIVE, _NAME]
    for batch in rows.select_columns(names).iter(_AT_ONCE):
        yield from zip(*(batch[name] for name in names), strict=True)


def _pairs(files: Sequence[InputFile], columns: PairColumns, csv: Csv, code: str) -> Iterator[dict[str, Any]]:
    for file in files:
        for row, place in places_of(file, rows_of(file, columns.asked("{}_column"), csv)):
            pair, wrong = columns.pair(row.values)
            found = {_QUERY: pair.query, _POSITIVE: pair.positives, _NEGATIVES: pair.negatives, _NAME: pair.name}
            yield {**found, **place, "problem": place["problem"] or wrong}


def _instructions(name: str, files: Sequence[str], arguments: ContrastiveArguments, validation: bool) -> list[str]:
    """One for each of the files; those to evaluate on may have their own, and else have those of training."""
    own, given = getattr(arguments, f"validation_{name}"), getattr(arguments, name)
    if validation and own:
        return _one_a_file(f"validation_{name}", own, len(files))
    if validation and len(given) not in (0, 1, len(files)):
        raise UserError(
            f"{name} has {len(given)} values and validation_file {len(files)}: give validation_{name}, one for all "
            "files or one for each"
        )
    return _one_a_file(name, given, len(files))


def _one_a_file(name: str, given: Sequence[str], count: int) -> list[str]:
    if len(given) not in (0, 1, count):
        raise UserError(f"{name} has {len(given)} values for {count} files: give one for all, or one for each")
    return list(given) * (count if len(given) == 1 else 1) or [""] * count
