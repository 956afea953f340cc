"""Pairs for training: what rows without an id are, and which instruction is put before the texts of which file."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import date
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm2vec_fast.errors import UserError
from llm2vec_fast.training.arguments import ContrastiveArguments
from llm2vec_fast.training.pairs import Pairs

Settings = Callable[..., dict[str, object]]
NAN = float("nan")


def file_of(path: Path, ids: list[object]) -> str:
    """A file of pairs of different texts with these ids."""
    rows = [{"query": f"{path.stem} q {i}", "positive": f"{path.stem} d {i}", "id": x} for i, x in enumerate(ids)]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        lines = ["query,positive,id", *(f"{row['query']},{row['positive']},{row['id']}" for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("name", "ids"),
    [
        ("rows.jsonl", ["a", None, None, "a", "", "  "]),
        ("rows.jsonl", [1, None, None, 1, None, None]),
        ("rows.parquet", [1.0, NAN, None, 1.0, NAN, NAN]),
        ("rows.csv", ["1", "", "", "1", "", ""]),
        ("rows.csv", ["NA", "", "", "NA", "", ""]),
    ],
)
def test_rows_without_an_id_are_not_the_same_thing(settings: Settings, tmp_path: Path, name: str, ids: list) -> None:
    file = file_of(tmp_path / name, ids)
    pairs = Pairs([file], ContrastiveArguments(**settings(train_file=[file], id_column="id")))
    things = [pairs[i]["ids"][0] for i in range(len(pairs))]
    assert things[0] == things[3]
    assert len(set(things)) == len(ids) - 1


def test_rows_that_are_left_out_are_told(settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [("q", "d"), ("", "d"), ("q", None), ("q", "d")]
    file.write_text("".join(json.dumps({"query": q, "positive": d}) + "\n" for q, d in rows))
    assert len(Pairs([str(file)], ContrastiveArguments(**settings(train_file=[str(file)])))) == 2
    told = "rows.jsonl:2 (the text in 'query' is empty), rows.jsonl:3 (the text in 'positive' is null)"
    assert f"2 of 4 rows are left out: {told}" in caplog.text


def test_an_id_is_the_same_in_a_file_where_some_are_missing(settings: Settings, tmp_path: Path) -> None:
    """The reader of csv makes floats of numbers among which one is missing."""
    files = [file_of(tmp_path / "a.csv", ["7", ""]), file_of(tmp_path / "b.csv", ["7", "8"])]
    pairs = Pairs(files, ContrastiveArguments(**settings(train_file=files, id_column="id")))
    assert pairs[0]["ids"] == pairs[2]["ids"]


QUERY, DOCUMENT = "query_instruction", "document_instruction"


@pytest.mark.parametrize(
    ("given", "count", "expected"),
    [
        ({}, 1, [("", "")]),
        ({QUERY: ["find:"]}, 2, [("find:", "")] * 2),
        ({QUERY: ["a:", "b:"], DOCUMENT: ["c:", "d:"]}, 2, [("a:", "c:"), ("b:", "d:")]),
        ({QUERY: ["a:", "b:"], f"validation_{QUERY}": ["v:"]}, 1, [("v:", "")]),
        ({QUERY: ["a:", "b:"], f"validation_{QUERY}": "v:"}, 2, [("v:", ""), ("v:", "")]),
        ({QUERY: ["a:"], f"validation_{DOCUMENT}": ["v:", "w:"]}, 2, [("a:", "v:"), ("a:", "w:")]),
    ],
)
def test_validation_files_have_their_instructions(
    settings: Settings, tmp_path: Path, given: dict, count: int, expected: list[tuple[str, str]]
) -> None:
    train = [file_of(tmp_path / f"{name}.jsonl", [1, 2]) for name in ("a", "b")]
    held = [file_of(tmp_path / f"held-{i}.jsonl", [1]) for i in range(count)]
    arguments = ContrastiveArguments(**settings(train_file=train, validation_file=held, **given))
    found = Pairs(arguments.validation_file, arguments, validation=True)
    assert [(found[i]["query"][0], found[i]["positive"][0]) for i in range(len(found))] == expected
    trained = Pairs(arguments.train_file, arguments)
    assert [trained[i]["query"][0] for i in (0, 2)] == (given.get(QUERY, [""]) * 2)[:2]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({QUERY: ["a:", "b:"]}, "query_instruction has 2 values and validation_file 1: give validation_query_instruc"),
        ({f"validation_{DOCUMENT}": ["v:", "w:"]}, "validation_document_instruction has 2 values for 1 files"),
    ],
)
def test_validation_files_that_no_instruction_fits_are_refused(
    settings: Settings, tmp_path: Path, given: dict, message: str
) -> None:
    train = [file_of(tmp_path / f"{name}.jsonl", [1, 2]) for name in ("a", "b")]
    held = [file_of(tmp_path / "held.jsonl", [1])]
    arguments = ContrastiveArguments(**settings(train_file=train, validation_file=held, **given))
    with pytest.raises(UserError, match=message):
        Pairs(arguments.validation_file, arguments, validation=True)


def test_negatives_that_look_like_numbers_or_dates_are_texts(settings: Settings, tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    values = ["007", "1.50", "2020-01-01", "NA", "null", "true", ""]
    file.write_text("query,positive,negative\n" + "".join(f"q{i},d{i},{x}\n" for i, x in enumerate(values)))
    pairs = Pairs([str(file)], ContrastiveArguments(**settings(train_file=[str(file)])))
    assert [pairs[i]["negatives"] for i in range(len(values))] == [[("", x)] if x else [] for x in values]


@pytest.mark.parametrize("value", [5, 1.5, True, ["a", 5], date(2020, 1, 1)], ids=str)
def test_a_negative_that_is_no_text_takes_its_row_with_it_and_is_told(
    settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture, value: object
) -> None:
    rows = [{"query": "q", "positive": "d", "negative": x} for x in (None if isinstance(value, date) else "n", value)]
    file = tmp_path / ("rows.parquet" if isinstance(value, date) else "rows.jsonl")
    if isinstance(value, date):
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ContrastiveArguments(**settings(train_file=[str(file)]))
    assert len(Pairs([str(file)], arguments)) == 1
    assert "1 of 2 rows is left out" in caplog.text
    assert "the text in 'negative' is not a string but" in arguments.listing(validation=False).read_text()
