"""Texts from files: what is said of those that cannot be read, and which of them it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llm2vec_fast.errors import UserError
from llm2vec_fast.training.texts import read_rows, read_texts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", None, "does not exist: check the path"),
        ("a.txt", b"", "a.txt is empty: give a file with texts"),
        ("a.jsonl", b"", "a.jsonl is empty: give a file with texts"),
        ("a.csv", b"", "a.csv is empty: give a file with texts"),
        ("a.txt", b" \n\n", "a.txt has no text in column 'text': check the file"),
        ("a.jsonl", b'{"words": "a"}\n', "a.jsonl has no column 'text': there are words"),
        ("a.jsonl", b'{"text": \n', "a.jsonl cannot be read: JSON parse error: Invalid value"),
        ("a.parquet", b"no table", "a.parquet cannot be read: "),
        ("a.txt", "Ma\u00f1ana\n".encode("latin-1"), "a.txt is not UTF-8: save it as UTF-8"),
        ("a.csv", "text\nMa\u00f1ana\n".encode("latin-1"), "a.csv is not UTF-8: save it as UTF-8"),
        ("a.jsonl", '{"text": "Ma\u00f1ana"}\n'.encode("latin-1"), "a.jsonl is not UTF-8: save it as UTF-8"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_and_why(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_texts([str(tmp_path / name)], "text")
    assert str(tmp_path / name) in str(caught.value)
    assert "training" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_of_several_files_the_empty_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\na cat\n")
    (tmp_path / "b.csv").write_text("")
    with pytest.raises(UserError, match=r"b\.csv is empty") as caught:
        read_rows([str(tmp_path / "a.csv"), str(tmp_path / "b.csv")])
    assert "a.csv" not in str(caught.value)


def test_words_that_csv_readers_take_for_nothing_are_texts(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,other\nNA,1\nnull,\n,3\na cat,4\n")
    assert read_texts([str(tmp_path / "a.csv")], "text")["text"][:] == ["NA", "null", "a cat"]
    assert read_rows([str(tmp_path / "a.csv")])["other"][:] == [1, None, 3, 4]


def test_several_files_are_one_in_their_order(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
    assert read_texts([str(tmp_path / "b.jsonl"), str(tmp_path / "a.jsonl")], "text")["text"][:] == ["b", "a"]
