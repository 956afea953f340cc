"""Pairs made of what libraries say of their functions."""

import pytest

from benchmarks.fetch import docstrings, libraries
from benchmarks.fetch.docstrings import Docstring
from benchmarks.fetch.libraries import Entry
from benchmarks.reproduce import pairs
from benchmarks.reproduce.pairs import Pair, functions, name_as_words, remarks
from benchmarks.reproduce.texts import normalised


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("readFileSync", "read file sync"),
        ("JSON", "json"),
        ("toJSONString", "to json string"),
        ("HTMLElement", "html element"),
        ("SSL_OP_ALL", "ssl op all"),
        ("child_process", "child process"),
    ],
)
def test_names_come_apart_as_they_are_read(name: str, expected: str) -> None:
    assert name_as_words(name) == expected


@pytest.fixture
def entries(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library of two functions."""
    found = [
        Entry("Reader", "readAll", "Reads all there is.", "It waits for the end.\n\n@return: all of it"),
        Entry("Reader", "close", "Ends what is read.", ""),
    ]
    monkeypatch.setattr(libraries, "entries", lambda: iter(found))


@pytest.mark.usefixtures("entries")
def test_a_name_goes_with_its_docstring_and_a_summary_with_what_follows() -> None:
    assert list(functions()) == [
        Pair("reader: read all", "Reads all there is.\n\nIt waits for the end.\n\n@return: all of it"),
        Pair("reader: close", "Ends what is read."),
    ]
    assert list(remarks()) == [Pair("Reads all there is.", "It waits for the end.\n\n@return: all of it")]


@pytest.mark.usefixtures("entries")
@pytest.mark.parametrize(
    ("scored", "searched", "kept"),
    [
        ((), (), ["Reads all there is.", "Ends what is read."]),
        (("It waits: for the END.",), (), ["Ends what is read."]),
        ((), ("Ends what is read.\n\nAnd more of it.",), ["Reads all there is."]),
        (("waits for the end",), ("the end",), ["Reads all there is.", "Ends what is read."]),
    ],
)
def test_pairs_hold_no_sentence_that_is_scored_or_searched(
    scored: tuple[str, ...], searched: tuple[str, ...], kept: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairs, "evaluation_texts", lambda: set(map(normalised, scored)))
    monkeypatch.setattr(docstrings, "collect", lambda: [Docstring(text, text) for text in searched])
    for kind in ("wordnet.synsets", "wikipedia.sections"):
        monkeypatch.setattr(f"benchmarks.fetch.{kind}", lambda: iter(()))
    found = pairs.data_sets()["functions"]
    assert sorted(pair.positive.split("\n")[0] for pair in found) == sorted(kept)
