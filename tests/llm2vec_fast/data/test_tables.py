"""Rows go through a job with nothing of them changed, whatever file they are in."""

from __future__ import annotations

import datetime
import decimal
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, load_dataset

from llm2vec_fast.data.delimited import Csv
from llm2vec_fast.data.inputs import find_inputs
from llm2vec_fast.data.rows import Problem
from llm2vec_fast.data.tables import Rows, TableRows, all_rows
from llm2vec_fast.data.writing import Added, write_rows
from llm2vec_fast.errors import UserError

ADDED = {
    "negative": Added([["n", "m"], []], pa.list_(pa.string())),
    "score": Added([0.5, None], pa.float64()),
}
VALUES: list[dict[str, Any]] = [
    {
        "query": "caf\u00e9 \u732b", "exact": 0.12345678901234567, "tiny": 5e-324, "big": 2**63 - 1, "count": 3,
        "none": None, "day": "2024-01-02", "time": "2024-01-02 03:04:05", "zip": "007", "nested": [[1, 2], [], [3]],
        "flag": True, "meta": {"a": 1, "b": [{"c": None}]}, "negative": "old",
    },
    {
        "query": "a\u2028b", "exact": 1.0, "tiny": -0.1, "big": -(2**63), "count": None, "none": None,
        "day": "2024-01-03", "time": "2024-01-02 03:04:06", "zip": "12", "nested": [], "flag": None,
        "meta": {"a": 2, "b": []}, "negative": None,
    },
]  # fmt: skip
KEPT = [{name: x for name, x in row.items() if name != "negative"} for row in VALUES]
WHOLE = [{**KEPT[0], "negative": ["n", "m"], "score": 0.5}, {**KEPT[1], "negative": [], "score": None}]


def read(*paths: Path) -> tuple[Rows, list[Problem]]:
    return all_rows(find_inputs(list(map(str, paths))), [], Csv())


def written(path: Path, *, to: str) -> Path:
    """What comes out of a file of rows."""
    (rows, problems), output = read(path), path.with_name(f"out.{to}")
    assert not problems
    rows = TableRows(rows.table(), rows.places) if to == "parquet" else rows
    with open(output, "wb") as file:
        write_rows(file, rows, ADDED, parquet=to == "parquet")
    return output


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().decode().split("\n")[:-1]]


def json_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def exactly(rows: list[dict[str, Any]]) -> str:
    """Python's own words for them: 1 and 1.0 and true differ."""
    return repr(rows)


def test_values_of_json_come_out_as_they_are(tmp_path: Path) -> None:
    out = written(json_lines(tmp_path / "in.jsonl", VALUES), to="jsonl")
    assert exactly(lines_of(out)) == exactly(WHOLE)
    assert "caf\u00e9 \u732b" in out.read_text()
    assert exactly(pq.read_table(written(tmp_path / "in.jsonl", to="parquet")).to_pylist()) == exactly(WHOLE)


@pytest.mark.parametrize("text", ["[\n{}\n]", "{}\n", "\ufeff{}\n", "\ufeff[{}]"])
def test_json_may_be_a_list_or_lines_and_have_a_mark(tmp_path: Path, text: str) -> None:
    rows = [json.dumps(row) for row in VALUES]
    for name in ("in.json", "in.jsonl"):
        (tmp_path / name).write_text(text.replace("{}", (",\n" if "[" in text else "\n").join(rows)))
        assert exactly(lines_of(written(tmp_path / name, to="jsonl"))) == exactly(WHOLE)


def test_rows_need_not_have_the_same_columns_or_types(tmp_path: Path) -> None:
    rows = [{"query": "a", "x": 10**30}, {"query": "b", "y": {"z": 1}, "x": "text"}]
    path = json_lines(tmp_path / "in.jsonl", rows)
    added = [{"negative": ["n", "m"], "score": 0.5}, {"negative": [], "score": None}]
    expected = [{**row, **more} for row, more in zip(rows, added, strict=True)]
    assert lines_of(written(path, to="jsonl")) == expected
    with pytest.raises(UserError, match=r"the column 'x' does not fit a parquet file .*: give an --output that ends"):
        written(path, to="parquet")


def test_what_json_cannot_hold_is_still_told(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"query": "half \\ud83d", "x": [NaN, {"y": -Infinity}]}\n{"query": "b"}\n')
    found = lines_of(written(path, to="jsonl"))
    assert found[0]["query"] == "half \ud83d"
    assert found[0]["x"] == [None, {"y": None}]


@pytest.mark.parametrize("values", [[1, 1.5], [True, 1], [[1], [1.5]], [{"a": 1}, {"a": 1.0}]], ids=str)
def test_numbers_that_a_parquet_column_would_change_are_refused(tmp_path: Path, values: list[Any]) -> None:
    path = json_lines(tmp_path / "in.jsonl", [{"query": "a", "x": value} for value in values])
    with pytest.raises(UserError, match="the column 'x' does not fit a parquet file"):
        written(path, to="parquet")


def test_values_of_csv_are_strings(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_text("query,zip,count,share,day,word\n1,007,1,0.10,2024-01-02,NA\n2,08,,1,,\n")
    expected = [
        {"query": "1", "zip": "007", "count": "1", "share": "0.10", "day": "2024-01-02", "word": "NA"},
        {"query": "2", "zip": "08", "count": "", "share": "1", "day": "", "word": ""},
    ]
    for found in (lines_of(written(path, to="jsonl")), pq.read_table(written(path, to="parquet")).to_pylist()):
        assert exactly([{k: x for k, x in row.items() if k not in ADDED} for row in found]) == exactly(expected)


def test_rows_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": \n3\n{"a": "\xf1"}\n{"a": 1, "a": 2}\n{"a": 2}\n')
    rows, problems = read(path)
    assert (rows.column("a"), rows.places) == ([1, 2], [("in.jsonl", 1, 1), ("in.jsonl", 6, 6)])
    assert [problem.place for problem in problems] == [f"in.jsonl:{line}" for line in (2, 3, 4, 5)]
    assert problems[3].reason == "the row has two fields 'a'"


def test_types_of_parquet_stay_and_json_has_their_texts(tmp_path: Path) -> None:
    moment = datetime.datetime(2024, 1, 2, 3, 4, 5, 678901, datetime.timezone.utc)
    values = {
        "query": ["a", "b"], "day": [moment.date(), None], "at": [moment, None], "bytes": [b"\x00\xff", None],
        "price": [decimal.Decimal("1.10"), None], "span": [datetime.timedelta(seconds=1), None],
    }  # fmt: skip
    table = pa.table(
        {**values, "small": pa.array([0.1, float("nan")], pa.float32()), "few": pa.array([1, 2], pa.int8())}
    )
    pq.write_table(table, tmp_path / "in.parquet")
    out = pq.read_table(written(tmp_path / "in.parquet", to="parquet"))
    assert out.select(table.column_names).schema == table.schema
    assert exactly(out.select(table.column_names).to_pylist()) == exactly(table.to_pylist())
    first, second = lines_of(written(tmp_path / "in.parquet", to="jsonl"))
    assert first["day"] == "2024-01-02"
    assert first["at"] == "2024-01-02T03:04:05.678901+00:00"
    assert (first["price"], first["bytes"], first["few"]) == ("1.10", "AP8=", 1)
    assert second["day"] is None
    assert second["small"] is None


def test_what_datasets_wrote_it_reads_again(tmp_path: Path) -> None:
    """With its classes, and the columns that are new."""
    rows = Dataset.from_dict({"query": ["a", "b"], "label": [1, 0]}).cast_column("label", ClassLabel(names=["x", "y"]))
    rows.to_parquet(tmp_path / "in.parquet")
    out = written(tmp_path / "in.parquet", to="parquet")
    again = load_dataset("parquet", data_files=str(out), split="train", cache_dir=str(tmp_path / "cache"))
    assert again.features["label"].names == ["x", "y"]
    assert again["negative"][:] == [["n", "m"], []]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("in.csv", b"a,b,a\n1,2,3\n", "in.csv has several columns named 'a': give each a name of its own"),
        ("in.parquet", b"no table", "in.parquet is not a Parquet file that can be read: "),
        ("in.jsonl.gz", b"no gzip", "in.jsonl.gz: from row 1 on the file cannot be read: Not a gzipped file"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_and_why(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_parquet_files_of_one_schema_are_one_table(tmp_path: Path) -> None:
    for name, kind in {"a": pa.int8(), "b": pa.int8(), "c": pa.int16()}.items():
        pq.write_table(pa.table({"x": pa.array([1], kind)}), tmp_path / f"{name}.parquet")
    rows, _ = read(tmp_path / "a.parquet", tmp_path / "b.parquet")
    assert rows.table().schema.field("x").type == pa.int8()
    assert rows.places == [("a.parquet", 1, None), ("b.parquet", 1, None)]
    with pytest.raises(UserError, match=r"c\.parquet has other columns or types than .*a\.parquet"):
        read(tmp_path / "a.parquet", tmp_path / "c.parquet")


def test_folders_around_a_parquet_file_add_no_column(tmp_path: Path) -> None:
    folder = tmp_path / "language=en"
    folder.mkdir()
    pq.write_table(pa.table({"query": ["a"]}), folder / "in.parquet")
    assert read(folder / "in.parquet")[0].names == ["query"]
