"""Pairs: a query, its documents, its hard negatives, and which other texts are known to suit it."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
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


def identity(text: str, kind: bytes = b"") -> int:
    """A number that texts share only if they are equal but for white space; the same on every machine.

    What is numbered as another ``kind`` shares none with a text.
    """
    digest = hashlib.blake2b(" ".join(text.split()).encode("utf-8", "surrogatepass"), digest_size=8, person=kind)
    return int.from_bytes(digest.digest(), "little", signed=True)


class KnownPositives:
    """Which texts are known to suit the query of a row: those whose id is among the row's. See `known_positives`."""

    def __init__(self, groups: np.ndarray, shared: Mapping[int, set[int]], of_texts: Mapping[int, int]) -> None:
        """``groups`` (rows, 2) of each row, ``shared`` texts of each group, and ids ``of_texts``."""
        self._groups, self._shared, self._of_texts = groups, shared, of_texts

    def of_row(self, row: int) -> list[int]:
        """The ids of what is known to suit a row's query."""
        groups = dict.fromkeys(self._groups[row].tolist())
        return [*groups, *sorted({text for group in groups for text in self._shared.get(group, ())})]

    def of_text(self, text: str) -> int:
        """The id of a text."""
        name = identity(text)
        return self._of_texts.get(name, name)


def known_positives(rows: Iterable[tuple[str, Sequence[str], str | None]]) -> KnownPositives:
    """A row's query is known to be suited by the texts of its row, and of the rows of the same query or the same name.

    That is all: it does not go on from row to row. Rows that share documents in a chain keep each other's others as
    negatives.

    Args:
        rows: query, documents, and what the row is called, None where it has no name; gone through once.
    """
    texts, of_queries, names = [], [], []
    for query, own, name in rows:
        texts.append([identity(query), *map(identity, own)])
        of_queries.append(identity(query, b"query"))
        names.append(name)
    groups = _groups(of_queries, names)
    # A text of one group goes by the group, so that a row of thousands of documents has one id; else by itself.
    of_texts: dict[int, int] = {}
    for own, of_row in zip(texts, groups.tolist(), strict=True):
        for group, text in itertools.product(of_row, own):
            if of_texts.setdefault(text, group) != group:
                of_texts[text] = text
    shared: dict[int, set[int]] = {}
    for own, of_row in zip(texts, groups.tolist(), strict=True):
        for group, text in itertools.product(of_row, own):
            if of_texts[text] == text:
                shared.setdefault(group, set()).add(text)
    return KnownPositives(groups, shared, of_texts)


def _groups(of_queries: Sequence[int], names: Sequence[str | None]) -> np.ndarray:
    """(rows, 2) int64, the groups of each row: of its query (a number), and of its name where another row has it too.

    The group of a query all of whose rows have one name is that of the name.
    """
    rows = Counter(names)
    of_names = [None if name is None or rows[name] == 1 else identity(name, b"name") for name in names]
    only: dict[int, int | None] = {}  # the name of all rows of a query, if they have one
    for query, name in zip(of_queries, of_names, strict=True):
        if only.setdefault(query, name) != name:
            only[query] = None
    first = [query if only[query] is None else only[query] for query in of_queries]
    second = [one if name is None else name for one, name in zip(first, of_names, strict=True)]
    return np.array([first, second], np.int64).reshape(2, -1).T.copy()


def _empty(value: Any) -> str:
    return "null" if value is None else "empty"
