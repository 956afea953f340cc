"""JSON as it is met: lists in any file, objects that are no rows, fields inside others, names that occur twice."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from llm2vec_fast.data import jsonl, lines
from llm2vec_fast.data.columns import Columns
from llm2vec_fast.data.delimited import Csv
from llm2vec_fast.data.inputs import describe, find_inputs
from llm2vec_fast.data.reading import rows_of
from llm2vec_fast.data.rows import Row
from llm2vec_fast.errors import InputError


def read(path: Path, content: str | bytes, columns: Columns = Columns()) -> list[Row]:  # noqa: B008
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    [file] = find_inputs([str(path)])
    return list(rows_of(file, columns.asked, Csv()))


def texts(rows: list[Row]) -> list[Any]:
    return [row.values[0] for row in rows if row.problem is None]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.ndjson"])
@pytest.mark.parametrize("indent", [None, 0, 2])
def test_a_list_is_read_under_any_name(tmp_path: Path, name: str, indent: int | None) -> None:
    records = [{"text": 'a "]},[" \\'}, {"text": "é", "more": [[{}], "}"]}, {"text": "c"}]
    assert texts(read(tmp_path / name, json.dumps(records, indent=indent))) == ['a "]},[" \\', "é", "c"]
    assert texts(read(tmp_path / name, "\ufeff\n " + json.dumps(records, indent=indent, ensure_ascii=False))) != []
    assert read(tmp_path / name, "[]") == []


@pytest.mark.parametrize("chunk", [1, 2, 7, 64])
def test_a_list_is_read_alike_in_pieces_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(jsonl, "CHUNK_BYTES", chunk)
    content = '[{"text": "a\\"é"},\n 12.5e3 , {"text": "猫"}\n,\n"x", {"text": "c", "n": {"m": [1, "]"]}}\n]\n'
    rows = read(tmp_path / "a.json", content)
    assert texts(rows) == ['a"é', "猫", "c"]
    assert [(row.line, row.problem) for row in rows if row.problem] == [
        (2, "the element is a JSON number, not an object with fields"),
        (4, "the element is a JSON string, not an object with fields"),
    ]


def test_an_element_that_is_no_json_is_a_bad_row(tmp_path: Path) -> None:
    rows = read(tmp_path / "a.json", b'[{"text": "a"},\n{"text": tru},\n{"text": "\xe9"},\n{"text": "b"},]')
    assert texts(rows) == ["a", "b"]
    assert [(row.line, str(row.problem)[:30]) for row in rows if row.problem] == [
        (2, "the element is not JSON: Expec"), (3, "byte 0xe9 of the element in li"), (4, "the element is blank"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('[{"text": "a"},\n{"text": "b"', "line 2: the element that begins there has no end"),
        ('[{"text": "a"}\n{"text": "b"}]', "line 2: a comma or the list's end should stand there, not '{'"),
        ('[{"text": "a"},\n{"text": "b"}]\n[{"text": "c"}]', "line 3: something follows the list"),
        ('[{"text": "a"}', "a comma or the list's end should stand there, not 'the end of the file'"),
    ],
)
def test_a_list_that_breaks_off_is_damaged_where_it_does(tmp_path: Path, content: str, told: str) -> None:
    *before, last = read(tmp_path / "a.json", content)
    assert texts(before)[0] == "a"
    assert last.damaged
    assert told in str(last.problem)


def test_a_jsonl_row_that_is_a_list_is_no_list_of_rows(tmp_path: Path) -> None:
    rows = read(tmp_path / "a.jsonl", '[1, 2]\n{"text": "a"}\n')
    assert [row.problem for row in rows] == ["the line is a JSON list, not an object with fields", None]


def test_one_object_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a\.json is one JSON object: write its rows as a list"):
        read(tmp_path / "a.json", json.dumps({"data": [{"text": "a"}]}, indent=1))


def test_fields_inside_others_can_be_named(tmp_path: Path) -> None:
    columns = Columns("meta.title", "a.b.c", ("meta", "x.y"))
    content = [
        {"meta": {"title": "one"}, "a": {"b.c": 1}, "x.y": "literal", "x": {"y": "inner"}},
        {"meta": {"title": "two"}, "a.b": {"c": 2}, "x": {"y": "inner"}},
        {"meta": {"other": "three"}},
    ]
    rows = read(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in content), columns)
    assert [row.values for row in rows[:2]] == [
        ["one", 1, {"title": "one"}, "literal"], ["two", 2, {"title": "two"}, "inner"],
    ]  # fmt: skip
    assert rows[2].problem == "the row has no field 'meta.title', only 'meta'"


def test_a_field_that_occurs_twice_is_named_if_it_is_asked_for(tmp_path: Path) -> None:
    content = '{"text": "a", "x": 1, "x": 2}\n{"text": "a", "text": "b"}\n{"m": {"t": "a", "t": "b"}, "text": "c"}\n'
    rows = read(tmp_path / "a.jsonl", content)
    assert [row.problem for row in rows] == [None, "the row has two fields 'text'", None]
    inner = read(tmp_path / "a.jsonl", content, Columns("text", None, ("m.t",)))
    assert inner[2].problem == "the row has two fields 't'"


def test_a_field_that_occurs_twice_inside_another_is_named(tmp_path: Path) -> None:
    """Of the two values one would be kept or written again, and the other lost."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "meta": [{"q": 1, "q": 2}]}\n{"text": "b", "meta": [{"q": 1}]}\n')
    told = ["the row has two fields 'q'", None]
    assert [row.problem for row in read(path, path.read_text(), Columns(keep=("meta",)))] == told
    assert [row.problem for row in rows_of(describe(path), [], Csv(), whole=True)] == told
    assert [row.problem for row in read(path, path.read_text())] == [None, None]


def test_a_field_may_be_rare(tmp_path: Path) -> None:
    content = '{"text": "a"}\n' * 500 + '{"text": "b", "rare": 1}\n'
    assert read(tmp_path / "a.jsonl", content, Columns("text", None, ("rare",)))[-1].values == ["b", 1]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz"])
def test_rows_before_the_damage_are_read(tmp_path: Path, name: str) -> None:
    records = [{"text": f"{i} {hash(str(i))}"} for i in range(50)]
    whole = json.dumps(records) if "json." in name else "".join(json.dumps(record) + "\n" for record in records)
    *rows, last = read(tmp_path / name, gzip.compress(whole.encode())[:-200])
    assert 0 < len(rows) < 50
    assert last.damaged


def test_an_element_longer_than_any_text_is_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "MAX_ROW_BYTES", 1000)
    monkeypatch.setattr(jsonl, "CHUNK_BYTES", 100)
    monkeypatch.setattr(lines, "MAX_ROW_BYTES", 1000)
    content = '[{"text": "a"},\n{"text": "' + "x" * 5000
    assert "longer than" in str(read(tmp_path / "a.json", content)[-1].problem)
