"""Only values of the types that are written come through; the message names the one that is not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import pytest

from llm2vec_fast.jobs.typed import MistypedError, dataclass_from


class Names(TypedDict, total=False):
    first: str


@dataclass(frozen=True)
class Inner:
    count: int


@dataclass(frozen=True)
class Outer:
    name: str
    share: float = 0.5
    kind: Literal["a", "b"] = "a"
    limit: int | None = None
    columns: tuple[str, ...] = ()
    inner: Inner | None = None
    names: Names | None = None
    counts: dict[str, int] | None = None


def test_what_is_of_its_types_comes_through() -> None:
    value = {
        **{"name": "n", "share": 1, "kind": "b", "limit": 3, "columns": ["x"], "inner": {"count": 2}},
        **{"names": {"first": "f"}, "counts": {"y": 1}},
    }
    made = dataclass_from(Outer, value, "it")
    assert made == Outer("n", 1, "b", 3, ("x",), Inner(2), {"first": "f"}, {"y": 1})
    assert dataclass_from(Outer, {"name": "n"}, "it") == Outer("n")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], r"it is \[\], not an object"),
        ({}, "it has no 'name'"),
        ({"name": "n", "trust_remote_code": True}, "it has 'trust_remote_code', which this program does not know"),
        ({"name": 1}, "name of it is 1, not str"),
        ({"name": "n", "limit": True}, "limit of it is True, not int or NoneType"),
        ({"name": "n", "limit": 1.0}, "limit of it is 1.0, not int or NoneType"),
        ({"name": "n", "kind": "c"}, "kind of it is 'c', not 'a' or 'b'"),
        ({"name": "n", "columns": "text"}, "columns of it is 'text', not"),
        ({"name": "n", "columns": ["text", 1]}, "an item of columns of it is 1, not str"),
        ({"name": "n", "inner": {"count": "2"}}, "inner of it is {'count': '2'}, not Inner or NoneType"),
        ({"name": "n", "names": {"second": "s"}}, "names of it is {'second': 's'}, not"),
        ({"name": "n", "counts": {"y": "1"}}, "counts of it is {'y': '1'}, not"),
        ({"name": "n" * 1000, "limit": "x" * 1000}, "limit of it is 'x{59}…, not"),
    ],
)
def test_what_is_not_is_named(value: Any, message: str) -> None:
    with pytest.raises(MistypedError, match=message):
        dataclass_from(Outer, value, "it")
