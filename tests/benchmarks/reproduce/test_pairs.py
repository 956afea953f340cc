"""Pairs of names and descriptions are made of words."""

import pytest

from benchmarks.reproduce.pairs import name_as_words


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
