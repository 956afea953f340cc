"""Columns by name: those of a file that are asked for, nested ones too (``meta.title``), and names that occur twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llm2vec_fast.data.rows import Asked
from llm2vec_fast.errors import InputError

SHOWN_NAMES = 30


@dataclass(frozen=True)
class Columns:
    """The columns that an embedding job reads: the text, the id (None: rows are numbered), and those kept beside."""

    text: str = "text"
    id: str | None = None
    keep: tuple[str, ...] = ()

    @property
    def asked(self) -> list[Asked]:
        """The text, the id if there is one, and what is kept."""
        return [Asked(self.text, "--text-column", text=True), *self.asked_ids, *self.asked_kept]

    @property
    def asked_ids(self) -> list[Asked]:
        """The id, if there is one."""
        return [] if self.id is None else [Asked(self.id, "--id-column")]

    @property
    def asked_kept(self) -> list[Asked]:
        """What is kept."""
        return [Asked(name, "--keep-columns", text=name == self.text) for name in self.keep]


class Repeated(dict):
    """A JSON object in which names occur twice; ``names`` are those."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.names = {name for name, count in Counter(name for name, _ in pairs).items() if count > 1}


def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, for `json.loads` as ``object_pairs_hook``."""
    found = dict(pairs)
    return found if len(found) == len(pairs) else Repeated(pairs)


def repeated_in(value: Any) -> str | None:
    """A name that occurs twice in an object of JSON or in one inside it, None where there is none."""
    inner = [value]
    while inner:
        each = inner.pop()
        if isinstance(each, Repeated):
            return min(each.names)
        if isinstance(each, dict | list):
            inner += each.values() if isinstance(each, dict) else each
    return None


def require_columns(shown: str, asked: Sequence[Asked], available: Sequence[str]) -> None:
    """Refuse a file, by what it is shown as, that lacks a column or has two of its name.

    Raises:
        InputError: it names the column and those there are.
    """
    counts = Counter(available)
    for name, option, required, _ in asked:
        if counts[name] > 1:
            raise InputError(f"{shown} has {counts[name]} columns named {name!r} ({option}): rename all but one")
        if required and not counts[name]:
            names = list(dict.fromkeys(available))
            there = ", ".join(map(repr, names[:SHOWN_NAMES])) or "none"
            more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
            raise InputError(f"{shown} has no column {name!r} ({option}): its columns are {there}{more}")


def require_different(shown: str, available: Sequence[str]) -> None:
    """Refuse a file of which all columns are taken and two share a name.

    Raises:
        InputError: it names the column.
    """
    twice = [name for name, count in Counter(available).items() if count > 1]
    if twice:
        raise InputError(f"{shown} has several columns named {twice[0]!r}: give each a name of its own")


def value_in(record: dict[str, Any], name: str) -> tuple[bool, Any]:
    """Whether a record has a field, and its value: one of this very name, else the field behind dots.

    Raises:
        KeyError: the field occurs twice.
    """
    if name in record:
        if isinstance(record, Repeated) and name in record.names:
            raise KeyError(name)
        return True, record[name]
    for dot in [place for place, letter in enumerate(name) if letter == "."]:
        inner = record.get(name[:dot])
        if isinstance(inner, dict):
            if isinstance(record, Repeated) and name[:dot] in record.names:
                raise KeyError(name[:dot])
            there, value = value_in(inner, name[dot + 1 :])
            if there:
                return True, value
    return False, None


def names_in(record: dict[str, Any], asked: Sequence[Asked]) -> list[str]:
    """The record's own names, and those asked for that it has behind dots."""
    nested = [name for name, *_ in asked if name not in record and _has(record, name)]
    return [*record, *nested]


def _has(record: dict[str, Any], name: str) -> bool:
    try:
        return value_in(record, name)[0]
    except KeyError:  # it is there, twice
        return True
