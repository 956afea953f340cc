"""Texts from files: what is said of rows and files that cannot be read, and which of them it is."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from datasets import Dataset
from reference_data import FOLDER
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from llm2vec_fast.data.delimited import Csv
from llm2vec_fast.errors import UserError
from llm2vec_fast.training import texts as module
from llm2vec_fast.training.texts import read_texts, tokenise


def texts_of(*files: object, **options: object) -> tuple[list[str], list[str]]:
    """The texts, and what is said."""
    said: list[str] = []
    found = read_texts([str(file) for file in files], "text", notify=said.append, **options)
    return found["text"][:], said


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", None, "a.txt does not exist: give a file"),
        ("a.txt", b"", "a.txt is empty"),
        ("a.jsonl", b"", "a.jsonl is empty"),
        ("a.csv", b"", "a.csv is empty"),
        (
            "a.txt",
            b" \n\n",
            r"a.txt has no text in column 'text': .*the first, a.txt:1: the text is empty",
        ),
        ("a.jsonl", b'{"words": "a"}\n', r"a.jsonl has no column 'text' \(text_column\): its columns are 'words'"),
        (
            "a.jsonl",
            b'{"text": \n',
            "a.jsonl has no text .*a.jsonl:1: the line is not JSON: Expecting value",
        ),
        ("a.parquet", b"no table", "a.parquet is not a Parquet file that can be read"),
        ("a.txt", "Ma\u00f1ana\n".encode("latin-1"), "a.txt:1: byte 0xf1 at byte 2 of the file is not UTF-8"),
        ("a.csv", "text\nMa\u00f1ana\n".encode("latin-1"), "a.csv:2: byte 0xf1 at byte 7 of the file is not UTF-8"),
        ("a.jsonl", '{"text": "Ma\u00f1ana"}\n'.encode("latin-1"), "a.jsonl:1: byte 0xf1"),
        (
            "a.csv",
            b'text\na\n"b\nc\n',
            "a.csv: the quote that opens in line 3 is never closed: lines 3 to 4",
        ),
        ("a.csv", b"id,text\n", "a.csv has no text in column 'text': check the file$"),
        ("a.json", b"[]", "a.json has no text in column 'text': check the file$"),
        ("a.txt.gz", b"\x1f\x8b\x08 not gzip", "a.txt.gz: from row 1 on the file cannot be read"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_and_why(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        texts_of(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_of_several_files_the_empty_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\na cat\n")
    (tmp_path / "b.csv").write_text("")
    texts, said = texts_of(tmp_path / "a.csv", tmp_path / "b.csv")
    assert texts == ["a cat"]
    assert said == [f"{tmp_path / 'b.csv'} is empty (0 bytes): skipped"]


def test_what_readers_take_for_nothing_numbers_or_dates_are_texts(tmp_path: Path) -> None:
    """For a reader that guesses types a column of dates has no text."""
    texts = ["NA", "null", "2020-01-02", "2020-01-02T03:04:05", "1.0", "true", "0x10", "a cat"]
    (tmp_path / "a.csv").write_text("text,other\n" + "".join(f"{text},1\n" for text in texts))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert texts_of(tmp_path / "a.csv")[0] == texts_of(tmp_path / "b.jsonl")[0] == texts


@pytest.mark.parametrize("again", [False, True], ids=["read", "read-again"])
def test_rows_that_are_no_texts_are_counted_named_and_listed(tmp_path: Path, again: bool) -> None:
    """Said again where the datasets library has the texts on disk already."""
    rows = ['{"text": "a"}', "", '{"text": 5}', '{"text": "b"}', '{"body": "c"}', '{"text": null}', "{"]
    (tmp_path / "a.jsonl").write_text("\n".join(rows) + "\n")
    listing = tmp_path / "out" / "errors.jsonl"
    if again:
        texts_of(tmp_path / "a.jsonl")
    texts, said = texts_of(tmp_path / "a.jsonl", listing=listing)
    assert texts == ["a", "b"]
    [sentence] = said
    assert sentence.startswith("5 of 7 rows are left out: a.jsonl:2 (the line is blank), a.jsonl:3 (the text is not")
    assert sentence.endswith(f", …; {listing} lists them all")
    listed = [json.loads(line) for line in listing.read_text().splitlines()]
    assert [(each["file"], each["line"]) for each in listed] == [("a.jsonl", line) for line in (2, 3, 5, 6, 7)]


def test_of_many_rows_the_first_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LISTED", 5)
    (tmp_path / "a.txt").write_text("a\n" + "\n" * 9)
    _, [sentence] = texts_of(tmp_path / "a.txt", listing=tmp_path / "errors.jsonl")
    assert sentence.startswith("9 of 10 rows are left out: a.txt:2 (the text is empty), ")
    assert sentence.endswith("errors.jsonl lists the first 5")
    assert len((tmp_path / "errors.jsonl").read_text().splitlines()) == 5
    texts_of(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_text("a\n")
    assert texts_of(tmp_path / "a.txt", listing=tmp_path / "errors.jsonl") == (["a"], [])
    assert not (tmp_path / "errors.jsonl").exists(), "a list of an earlier run is left"


def test_several_files_are_one_in_their_order_whatever_their_formats(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "b"}) + "\n")
    (tmp_path / "a.txt").write_text("a\n")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "d.tsv").write_text('id\ttext\n1\t"d\n')
    texts, _ = texts_of(tmp_path / "b.jsonl", tmp_path / "a.txt", tmp_path / "c", tmp_path / "*.jsonl")
    assert texts == ["b", "a", '"d']


def test_other_readers_read_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code of the readers decides what was read, too: a release that reads better finds nothing of an older one."""
    (tmp_path / "a.txt").write_text("one\n")
    assert texts_of(tmp_path / "a.txt")[0] == ["one"]
    monkeypatch.setattr(module, "text_of", lambda value: (value.upper(), None))
    assert texts_of(tmp_path / "a.txt")[0] == ["one"], "nothing is kept, and this test tells nothing"
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "lines.py").write_text("other code")
    monkeypatch.setattr(module.data, "__file__", str(tmp_path / "room" / "__init__.py"))
    assert texts_of(tmp_path / "a.txt")[0] == ["ONE"]


def test_another_content_or_another_setting_is_read_anew(tmp_path: Path) -> None:
    """The datasets library keeps what was read; of the same size a file is another one by its time of change."""
    path = tmp_path / "a.csv"
    path.write_text("text\n'one'\n")
    assert texts_of(path)[0] == ["'one'"]
    assert texts_of(path, csv=Csv(quote="'"))[0] == ["one"]
    path.write_text("text\n'two'\n")
    os.utime(path, ns=(0, 0))
    assert texts_of(path)[0] == ["'two'"]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", "text\n007\n1.50\n2020-01-01\ntrue\nNA\nnan\n", ["007", "1.50", "2020-01-01", "true", "NA", "nan"]),
        ("a.csv", '\ufeff"text",b\r\n"x\ny",1\r\n', ["x\ny"]),
        ("a.jsonl", '\ufeff{"text": "007"}\n\ufeff{"text": "null"}\n', ["007", "null"]),
        ("a.txt", "\ufeffone\n\ufefftwo\n", ["one", "two"]),
        ("a.txt", "o\fn\u2028e\x85\ntwo\r\n", ["o\fn\u2028e\x85", "two"]),
    ],
)
def test_texts_are_what_the_file_says(tmp_path: Path, name: str, content: str, expected: list[str]) -> None:
    (tmp_path / name).write_bytes(content.encode())
    assert texts_of(tmp_path / name) == (expected, [])


@pytest.mark.parametrize(
    ("line_by_line", "sentence"),
    [
        (True, "2 of 12 texts of validation_file are left out: they have one token or none"),
        (False, "18 of 42 tokens of validation_file are left out: the last of each 1,000 texts, which do not fill 24;"),
    ],
)
def test_texts_that_are_too_short_are_told(line_by_line: bool, sentence: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "llama")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    assert [len(tokenizer(text)["input_ids"]) for text in ("the cat", "a")] == [4, 1]
    texts = Dataset.from_dict({"text": ["the cat"] * 10 + ["a"] * 2})
    said: list[str] = []
    tokenise(texts, tokenizer, 24, line_by_line=line_by_line, name="validation_file", notify=said.append)
    assert [each[: len(sentence)] for each in said] == [sentence]
