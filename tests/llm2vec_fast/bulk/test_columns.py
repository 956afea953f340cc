"""Ids and kept columns of a job join back to their source, whatever they are and whatever stops the job."""

from __future__ import annotations

import datetime
import decimal
import json
import os
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_encoder import FakeEncoder
from folders import errors, ids, manifest, table

from llm2vec_fast.bulk import duplicates
from llm2vec_fast.bulk.job import JobStoppedError, Outcome
from llm2vec_fast.bulk.search import search
from llm2vec_fast.errors import InputError

Run = Callable[..., Outcome]
DAY = datetime.date(2024, 1, 2)
ROWS = 35
IDS = {
    "int64": pa.array(range(2**53, 2**53 + ROWS)),
    "double": pa.array([1.23e16 + 4 * i for i in range(ROWS)]),
    "decimal": pa.array([decimal.Decimal(i) / 100 for i in range(ROWS)], pa.decimal128(9, 2)),
    "date": pa.array([DAY + datetime.timedelta(i) for i in range(ROWS)]),
    "nanosecond": pa.array(range(ROWS), pa.timestamp("ns", "UTC")),
    "binary": pa.array([b"\xff%d" % i for i in range(ROWS)]),
    "string": pa.array([f'"k{i}"' for i in range(ROWS)]),
}


def never_load(settings: object) -> FakeEncoder:
    raise AssertionError("the model was loaded")


@pytest.mark.parametrize("kind", IDS)
def test_ids_join_back_to_their_source(run: Run, tmp_path: Path, kind: str) -> None:
    texts, numbers = [f"text {i}" for i in range(ROWS)], pa.array(range(ROWS), pa.int8())
    source = pa.table({"key": IDS[kind], "text": texts, "n": numbers})
    pq.write_table(source, tmp_path / "a.parquet")
    said: list[str] = []
    run(tmp_path / "a.parquet", id_column="key", keep_columns=("text", "n"), notify=said.append)
    found = table(tmp_path / "out").drop_columns("embedding")
    assert found.schema.types == [IDS[kind].type, pa.string(), pa.int8()]
    joined = source.join(found, "key", "id", right_suffix="_found").sort_by("n")
    assert joined["text"].to_pylist() == joined["text_found"].to_pylist()
    assert joined["n"].to_pylist() == joined["n_found"].to_pylist() == list(range(ROWS))
    assert not said


def test_uuids_stay_uuids(run: Run, tmp_path: Path) -> None:
    if not hasattr(pa, "uuid"):
        pytest.skip("pyarrow 18 has them")
    keys = [uuid.UUID(int=i) for i in range(3)]
    column = pa.array([key.bytes for key in keys], pa.uuid())
    pq.write_table(pa.table({"key": column, "text": ["a", "b", "c"]}), tmp_path / "a.parquet")
    run(tmp_path / "a.parquet", id_column="key")
    assert table(tmp_path / "out").schema.field("id").type == pa.uuid()
    assert ids(tmp_path / "out") == keys


def test_all_parts_have_one_schema_that_a_stopped_job_goes_on_with(run: Run, tmp_path: Path) -> None:
    """What a column of JSON is the last of its rows may tell."""
    rows = [{"text": f"t {i}", "key": i, "n": i if i < 34 else "x", "f": None if i < 30 else 0.5} for i in range(35)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    stop = threading.Event()

    class Stopping(FakeEncoder):
        def encode(self, sentences: Any, **options: Any) -> Any:
            if self.calls == 2:
                stop.set()
            return super().encode(sentences, **options)

    columns = {"id_column": "key", "keep_columns": ("n", "f")}
    with pytest.raises(JobStoppedError):
        run(path, encoder=Stopping(), stop=stop, **columns)
    assert manifest(tmp_path / "out")["resolved"]["types"] == {"key": "int64", "n": "string", "f": "double"}
    run(path, **columns)
    schemas = {str(pq.read_schema(part)) for part in (tmp_path / "out").glob("part-*.parquet")}
    assert len(schemas) == 1
    found = table(tmp_path / "out")
    assert found["id"].to_pylist() == list(range(35))
    assert found["n"].to_pylist() == [str(i) for i in range(34)] + ["x"]
    assert found["f"].to_pylist() == [None] * 30 + [0.5] * 5


def test_files_whose_columns_do_not_fit_are_refused_before_the_work(run: Run, tmp_path: Path) -> None:
    pq.write_table(pa.table({"key": [1], "text": ["a"]}), tmp_path / "a.parquet")
    (tmp_path / "b.csv").write_text("key,text\n1,b\n")
    with pytest.raises(InputError, match=r"column 'key' is int64 in .*a\.parquet and string in .*b\.csv: make"):
        run(tmp_path / "a.parquet", tmp_path / "b.csv", id_column="key", load=never_load)


def test_rows_without_an_id_or_with_half_a_letter_kept_are_named(run: Run, tmp_path: Path) -> None:
    pq.write_table(pa.table({"key": [1.0, float("nan"), None], "text": ["a", "b", "c"]}), tmp_path / "a.parquet")
    run(tmp_path / "a.parquet", id_column="key")
    assert ids(tmp_path / "out") == [1.0]
    reasons = {2: "the id (column 'key') is nan, not a string or number", 3: "the id (column 'key') is null, not a"}
    assert all(each["reason"].startswith(reasons[each["row"]]) for each in errors(tmp_path / "out"))
    (tmp_path / "b.jsonl").write_text('{"text": "a", "t": "\\ud83d"}\n{"text": "b", "t": "é", "x": ["\\ud83d"]}\n')
    run(tmp_path / "b.jsonl", output="b", keep_columns=("t", "x"))
    assert [(each["line"], each["reason"][:40]) for each in errors(tmp_path / "b")] == [
        (1, "the column 't' holds half a surrogate pa")
    ]
    assert table(tmp_path / "b")["x"].to_pylist() == ['["\\ud83d"]']


def test_ids_that_occur_twice_are_counted_and_said(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [*range(-3, 20), 5, 5, 7, -1]  # -1 and -2 have one hash in Python
    rows = [json.dumps({"text": f"t {i}", "key": key}) for i, key in enumerate(keys)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    said: list[str] = []
    run(tmp_path / "a.jsonl", id_column="key", notify=said.append)
    assert said == ["3 ids of column 'key', such as -1, occur in 7 rows: rows of one id cannot be told apart"]
    monkeypatch.setattr(duplicates, "ROWS_LOOKED_AT", 20)
    run(tmp_path / "a.jsonl", output="few", id_column="key", notify=said.append)
    assert said[1:] == ["no id of column 'key' occurs twice among the first 20 rows; the others were not looked at"]


def test_rows_left_out_have_their_line(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('key,text\n1,"two\nlines"\n2,\n3,b\n4,"open\n5,c\n')
    outcome = run(tmp_path / "a.csv", id_column="key")
    assert ids(tmp_path / "out") == ["1", "3"]
    first, last = errors(tmp_path / "out")
    assert (first["row"], first["line"], first["id"], first["reason"]) == (2, 4, "2", "the text is empty")
    assert (last["row"], last["line"], last["id"]) == (4, 6, None)
    assert last["reason"] == "the quote that opens in line 6 is never closed: lines 6 to 7 are not read"
    assert outcome.damaged == 1


def test_hits_show_ids_and_columns_of_any_type(run: Run, tmp_path: Path) -> None:
    values = {"day": [DAY], "price": [decimal.Decimal("1.10")], "raw": [b"caf\xe9"], "tags": [["a", None]], "f": [0.1]}
    pq.write_table(pa.table({"key": [7], "text": ["gamma"], **values}), tmp_path / "a.parquet")
    run(tmp_path / "a.parquet", id_column="key", keep_columns=("text", *values))
    [[hit]] = search(tmp_path / "out", ["gamma"], load=lambda settings: FakeEncoder())
    assert hit.id == 7
    assert hit.columns == {
        "text": "gamma", "day": "2024-01-02", "price": "1.10", "raw": "caf\\xe9", "tags": ["a", None], "f": 0.1,
    }  # fmt: skip


def test_nested_columns_are_read_and_kept_under_their_names(run: Run, tmp_path: Path) -> None:
    rows = [{"doc": {"body": f"t {i}", "n": i}, "meta": {"key": f"k{i}"}} for i in range(3)]
    pq.write_table(pa.Table.from_pylist([*rows, {"doc": None, "meta": {"key": "x"}}]), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("a.parquet", "a.jsonl"):
        options = {"text_column": "doc.body", "id_column": "meta.key", "keep_columns": ("doc.n",)}
        run(tmp_path / name, output=name[2:], **options)
        found = table(tmp_path / name[2:]).drop_columns("embedding").to_pylist()
        assert found == [{"id": f"k{i}", "doc.n": i} for i in range(3)]
        [[hit]] = search(tmp_path / name[2:], ["t 1"], top_k=1, load=lambda settings: FakeEncoder())
        assert (hit.id, hit.columns) == ("k1", {"doc.n": 1})
    assert [each["reason"] for each in errors(tmp_path / "parquet")] == ["the text is null"]


def test_a_file_name_that_is_not_utf8_goes_through_a_whole_job(run: Run, tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")
    Path(path).write_text("a\n\nb\n")
    run(path)
    assert ids(tmp_path / "out") == ["caf\\xe9.txt:1", "caf\\xe9.txt:3"]
    assert [each["file"] for each in errors(tmp_path / "out")] == ["caf\\xe9.txt"]
    assert run(path, load=never_load).already_finished


def test_parquet_files_and_outputs_may_have_names_that_are_not_utf8(run: Run, tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.parquet")
    with open(path, "wb") as file:
        pq.write_table(pa.table({"text": ["a", "b"], "key": [1, 1]}), file)
    said: list[str] = []
    output = os.fsdecode(b"caf\xe9")
    run(path, output=output, id_column="key", notify=said.append)
    with open(tmp_path / output / "part-00000.parquet", "rb") as file:
        assert pq.read_table(file)["id"].to_pylist() == [1, 1]
    assert said == ["1 of column 'key' occurs in 2 rows: rows of one id cannot be told apart"]


def test_numbers_that_json_has_not_stay_what_they_are(run: Run, tmp_path: Path) -> None:
    rows = [
        {"id": 1, "x": float("nan")},
        {"id": 2, "x": "n/a"},
        {"id": 3, "x": [1, float("inf")]},
        {"id": 4, "x": None},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": "t", **row}) + "\n" for row in rows))
    run(tmp_path / "a.jsonl", id_column="id", keep_columns=("x",))
    assert table(tmp_path / "out")["x"].to_pylist() == ["NaN", "n/a", "[1, Infinity]", None]


def test_what_is_no_id_does_not_decide_the_type_of_ids(run: Run, tmp_path: Path) -> None:
    rows = [{"key": key, "text": "t"} for key in (7, True, float("nan"), [1], "", None, 8)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(tmp_path / "a.jsonl", id_column="key")
    assert ids(tmp_path / "out") == [7, 8]
    assert [each["row"] for each in errors(tmp_path / "out")] == [2, 3, 4, 5, 6]
