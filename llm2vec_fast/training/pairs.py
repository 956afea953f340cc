"""Training pairs: files of queries with their documents and hard negatives, each file a data set of its own."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets

from llm2vec_fast.errors import UserError
from llm2vec_fast.training.arguments import NEGATIVE_COLUMNS, ContrastiveArguments
from llm2vec_fast.training.packing import identity
from llm2vec_fast.training.sampling import DrawnAnew
from llm2vec_fast.training.texts import read_rows

logger = logging.getLogger(__name__)

_QUERY, _POSITIVE, _NEGATIVES, _THING = "query", "positives", "negatives", "thing"


class Pairs(DrawnAnew):
    """Queries, each with a document drawn of its own and hard negatives drawn of its own: others in every epoch.

    What is drawn follows from the seed, the epoch and the row alone.

    Attributes:
        sizes: rows of each file, which are numbered one file after the other.
    """

    def __init__(self, files: Sequence[str], arguments: ContrastiveArguments, *, validation: bool = False) -> None:
        """Read the files.

        Raises:
            UserError: a file cannot be read, lacks a column, or holds no row with a query and a document.
        """
        super().__init__()
        self._query_instructions = _instructions("query_instruction", files, arguments, validation)
        self._document_instructions = _instructions("document_instruction", files, arguments, validation)
        self._seed, self._count = arguments.seed_of_data, arguments.negatives
        read = [_read(name, arguments) for name in files]
        self.sizes = [len(rows) for rows in read]
        self._rows = concatenate_datasets(read)
        self._things = same_things(self._rows[_QUERY], self._rows[_POSITIVE], self._rows[_THING])
        self._ends = np.cumsum(self.sizes)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """``query``, ``positive`` and ``negatives`` as (instruction, text) pairs, ``ids`` of the documents, ``row``."""
        row, file = self._rows[index], int(np.searchsorted(self._ends, index, side="right"))
        rng = np.random.default_rng([self._seed, self.epoch, index])
        positive = row[_POSITIVE][int(rng.integers(len(row[_POSITIVE])))]
        count = min(self._count, len(row[_NEGATIVES]))
        drawn = rng.choice(len(row[_NEGATIVES]), count, replace=False).tolist() if count else []
        negatives = [row[_NEGATIVES][i] for i in drawn]
        of_documents = self._document_instructions[file]
        return {
            "query": (self._query_instructions[file], row[_QUERY]),
            "positive": (of_documents, positive),
            "negatives": [(of_documents, text) for text in negatives],
            "ids": [self._things.of_row(index), *map(self._things.of_text, negatives)],
            "row": index,
        }


class SameThings:
    """Which documents count as the same thing, and so never as each other's negatives; see `same_things`."""

    def __init__(self, of_rows: np.ndarray, of_texts: dict[int, int]) -> None:
        self._of_rows, self._of_texts = of_rows, of_texts

    def of_row(self, row: int) -> int:
        """The thing that a row's documents are."""
        return int(self._of_rows[row])

    def of_text(self, text: str) -> int:
        """The thing that a text is: that of the rows whose document it is, else one of its own."""
        name = identity(text)
        return self._of_texts.get(name, name)


def same_things(queries: Sequence[str], positives: Sequence[Sequence[str]], names: Sequence[str | None]) -> SameThings:
    """Rows are the same thing if they share the query, a document, or the name given; and so on, from row to row.

    Args:
        queries: of each row.
        positives: the documents of each row, at least one.
        names: what each row is called, None where it has no name.
    """
    marks = [
        [identity(query), *map(identity, documents), *([] if name is None else [identity(f"name {name}")])]
        for query, documents, name in zip(queries, positives, names, strict=True)
    ]
    thing = {mark: mark for row in marks for mark in row}

    def root(mark: int) -> int:
        while thing[mark] != mark:
            thing[mark] = thing[thing[mark]]
            mark = thing[mark]
        return mark

    for first, *others in marks:
        for other in others:
            low, high = sorted((root(first), root(other)))
            thing[high] = low
    return SameThings(np.array([root(row[0]) for row in marks], np.int64), {mark: root(mark) for mark in thing})


def _read(name: str, arguments: ContrastiveArguments) -> Dataset:
    """One file's rows: ``query``, ``positives`` and ``negatives`` (lists) and ``thing`` (None for no name)."""
    found = read_rows([name])
    missing = [c for c in (arguments.query_column, arguments.positive_column) if c not in found.column_names]
    asked = [c for c in arguments.negative_columns if c not in found.column_names]
    if arguments.negative_columns != list(NEGATIVE_COLUMNS):
        missing += asked
    missing += [c for c in [arguments.id_column] if c is not None and c not in found.column_names]
    if missing:
        raise UserError(f"{name} has no column {missing[0]!r}: there are {', '.join(found.column_names)}")
    query, positive, name_of = arguments.query_column, arguments.positive_column, arguments.id_column
    negatives = [c for c in arguments.negative_columns if c in found.column_names]

    def arrange(row: dict[str, Any]) -> dict[str, Any]:
        return {
            _QUERY: row[query] if isinstance(row[query], str) else "",
            _POSITIVE: list(texts_in(row[positive])),
            _NEGATIVES: [text for column in negatives for text in texts_in(row[column])],
            _THING: None if name_of is None else name_in(row[name_of]),
        }

    rows = found.map(arrange, remove_columns=found.column_names, features=_features(), desc="arranging")
    rows = rows.filter(lambda row: bool(row[_QUERY].strip() and row[_POSITIVE]), desc="keeping rows with texts")
    if not len(rows):
        raise UserError(f"{name} has no row with a text in {query!r} and in {positive!r}: check the columns")
    if len(rows) < len(found) and arguments.process_index == 0:
        logger.warning(
            "%d of %d rows of %s are left out: no text in %r or in %r",
            len(found) - len(rows), len(found), name, query, positive,
        )  # fmt: skip
    return rows


def _features() -> Any:
    from datasets import Features, List, Value

    text = Value("string")
    return Features({_QUERY: text, _POSITIVE: List(text), _NEGATIVES: List(text), _THING: text})


def texts_in(value: Any) -> Iterator[str]:
    """The texts that are not empty in a column's value, which is one, a list of them, or none."""
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str) and text.strip():
            yield text


def name_in(value: Any) -> str | None:
    """What a column of ids calls a row; None where it has no value, NaN or a text of nothing."""
    if isinstance(value, float) and value.is_integer():  # columns of numbers that miss one are often floats
        value = int(value)
    return None if value is None or value != value or not str(value).strip() else str(value)


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
