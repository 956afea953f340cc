"""Pairs: a query, its documents, its hard negatives, and which rows are about the same thing."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from llm2vec_fast.data.rows import Asked, text_of
from llm2vec_fast.data.values import shown_value


class Pair(NamedTuple):
    """``name`` is what the row's id calls it, None where it has none."""

    query: str
    positives: list[str]
    negatives: list[str]
    name: str | None


@dataclass(frozen=True)
class PairColumns:
    """Where pairs are; ``negatives_required`` if a file may not lack those columns."""

    query: str = "query"
    positive: str = "positive"
    negatives: tuple[str, ...] = ()
    id: str | None = None
    negatives_required: bool = True

    def asked(self, option: str) -> list[Asked]:
        """The query, the positive, the id if there is one, the negatives; ``option`` has a place for the role."""
        named = [] if self.id is None else [Asked(self.id, option.format("id"))]
        return [
            Asked(self.query, option.format("query")),
            Asked(self.positive, option.format("positive")),
            *named,
            *(Asked(name, f"{option.format('negative')}s", self.negatives_required) for name in self.negatives),
        ]

    def pair(self, values: Sequence[Any]) -> tuple[Pair, str | None]:
        """The pair that a row's values of these columns are, and what is wrong with it."""
        query, wrong = text_of(values[0], f"text in {self.query!r}")
        positives, other = texts_in(values[1], self.positive)
        wrong = wrong or other or (None if positives else f"the text in {self.positive!r} is {_empty(values[1])}")
        name = None if self.id is None else name_in(values[2])
        negatives: list[str] = []
        for column, value in zip(self.negatives, values[len(values) - len(self.negatives) :], strict=True):
            found, other = texts_in(value, column)
            negatives += found
            wrong = wrong or other
        return Pair(query, positives, negatives, name), wrong


def texts_in(value: Any, column: str) -> tuple[list[str], str | None]:
    """The texts of a column's value, which is one, a list of them, or none, and what is wrong with it.

    Nothing, and texts of white space, are no texts, and nothing wrong: lists are filled up with them.
    """
    texts = []
    try:
        value = value[0].as_py() if isinstance(value, pa.Array) else value
    except UnicodeDecodeError as error:
        return [], f"the text in {column!r} is not UTF-8: {error.reason}"
    for each in value if isinstance(value, list) else [value]:
        if each is None or (isinstance(each, str) and not each.strip()):
            continue
        text, wrong = text_of(each, f"text in {column!r}")
        if wrong is not None:
            return [], wrong
        texts.append(text)
    return texts, None


def name_in(value: Any) -> str | None:
    """What a column of ids calls a row; None where it has no value, NaN or a text of nothing."""
    if isinstance(value, float) and value.is_integer():  # columns of numbers that miss one are often floats
        value = int(value)
    if value is None or value != value:
        return None
    shown = str(shown_value(value)).encode("utf-8", "backslashreplace").decode()
    return shown if shown.strip() else None


def identity(text: str) -> int:
    """A number that texts share only if they are equal but for white space; the same on every machine."""
    digest = hashlib.blake2b(" ".join(text.split()).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


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


def _empty(value: Any) -> str:
    return "null" if value is None else "empty"
