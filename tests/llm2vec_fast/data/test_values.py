"""Ids and kept columns: no value becomes another, whatever its type and whatever its file."""

from __future__ import annotations

import datetime
import decimal
import json
import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm2vec_fast.data.delimited import Csv
from llm2vec_fast.data.inputs import find_inputs
from llm2vec_fast.data.reading import decide_types, rows_of
from llm2vec_fast.data.rows import Asked
from llm2vec_fast.data.values import id_problem, shown_value, to_array, types_from_text, types_to_text
from llm2vec_fast.errors import InputError

UTC = datetime.timezone.utc
MOMENT = datetime.datetime(2024, 1, 2, 3, 4, 5, 678901, UTC)
COLUMNS = {
    "int8": pa.array([1, None, -3], pa.int8()),
    "uint64": pa.array([2**64 - 1, None, 0], pa.uint64()),
    "half": pa.array([1.5, None, float("nan")], pa.float16()),
    "float": pa.array([0.1, None, 1.0], pa.float32()),
    "double": pa.array([1.23e16, None, -0.0], pa.float64()),
    "decimal": pa.array([decimal.Decimal("1.10"), None, decimal.Decimal("-0.01")], pa.decimal128(9, 2)),
    "flag": pa.array([True, None, False]),
    "string": pa.array(["é", None, ""], pa.large_string()),
    "binary": pa.array([b"\xff\x00", None, b"text"]),
    "fixed": pa.array([b"ab", None, b"\xff\xff"], pa.binary(2)),
    "date": pa.array([MOMENT.date(), None, datetime.date(1, 1, 1)]),
    "time": pa.array([1, None, 86_399_999_999_999], pa.time64("ns")),
    "second": pa.array([1, None, -(10**9)], pa.timestamp("s")),
    "nanosecond": pa.array([1, None, 2**62 + 1], pa.timestamp("ns", "Europe/Berlin")),
    "span": pa.array([1, None, -5], pa.duration("ns")),
    "list": pa.array([[1, None], None, []], pa.list_(pa.int16())),
    "struct": pa.array([{"a": 1, "b": None}, None, {"a": None, "b": []}]),
    "map": pa.array([[("k", 1)], None, []], pa.map_(pa.string(), pa.int8())),
    "times": pa.array([[2**61 + 1], None, []], pa.list_(pa.timestamp("ns"))),
    "nothing": pa.nulls(3),
}
if hasattr(pa, "uuid"):  # pyarrow 18
    COLUMNS["uuid"] = pa.array([uuid.UUID(int=1).bytes, None, uuid.UUID(int=2**127).bytes], pa.uuid())


@pytest.mark.parametrize("name", COLUMNS)
def test_a_parquet_column_comes_out_as_it_is(tmp_path: Path, name: str) -> None:
    pq.write_table(pa.table({name: COLUMNS[name]}), tmp_path / "a.parquet")
    stored = pq.read_table(tmp_path / "a.parquet")[name].combine_chunks()
    types, found = through(tmp_path / "a.parquet", name)
    assert types[name] == stored.type
    assert same(found, types[name], stored)
    assert json.dumps(list(map(shown_value, found)), allow_nan=False)


def same(found: list[Any], kind: pa.DataType, stored: pa.Array) -> bool:
    """Bit for bit: Arrow's own comparison takes no NaN for equal."""
    array = to_array(found, kind)
    return array.type == stored.type and str(array) == str(stored)


def through(path: Path, name: str) -> tuple[dict[str, pa.DataType], list[Any]]:
    """A column's type as it is decided, and its values."""
    files, asked = find_inputs([str(path)]), Asked(name, "--keep-columns")
    types = decide_types(files, None, [asked], Csv())
    return types_from_text(types_to_text(types)), [row.values[0] for row in rows_of(files[0], [asked], Csv())]


@pytest.mark.parametrize("kind", ["dictionary", "string_view", "binary_view"])
def test_types_that_belong_to_a_file_become_those_of_their_values(tmp_path: Path, kind: str) -> None:
    plain = pa.array(["a", None, "b", "a"])
    odd = {"dictionary": lambda: plain.dictionary_encode(), "string_view": lambda: plain.cast(pa.string_view())}
    column = odd.get(kind, lambda: plain.cast(pa.binary()).cast(pa.binary_view()))()
    pq.write_table(pa.table({"x": column}), tmp_path / "a.parquet")
    types, found = through(tmp_path / "a.parquet", "x")
    assert types["x"] in (pa.string(), pa.binary())
    assert to_array(found, types["x"]).cast(pa.string()).to_pylist() == plain.to_pylist()


@pytest.mark.parametrize(
    ("values", "kind", "written"),
    [
        (["a", None, "1"], pa.string(), ["a", None, "1"]),
        ([1, None, -(2**63)], pa.int64(), [1, None, -(2**63)]),
        ([1, 2**64 - 1], pa.uint64(), [1, 2**64 - 1]),
        ([1.0, 1.23e16, None], pa.float64(), [1.0, 1.23e16, None]),
        ([True, None], pa.bool_(), [True, None]),
        ([None, None], pa.string(), [None, None]),
        ([1, 1.5], pa.string(), ["1", "1.5"]),
        ([-1, 2**64 - 1], pa.string(), ["-1", "18446744073709551615"]),
        ([2**64], pa.string(), ["18446744073709551616"]),
        ([1, "a"], pa.string(), ["1", "a"]),
        ([True, 1], pa.string(), ["true", "1"]),
        ([["a"], {"b": "é\ud83d"}], pa.string(), ['["a"]', '{"b": "é\\ud83d"}']),
    ],
    ids=str,
)
def test_the_type_of_a_json_column_follows_from_all_its_rows(
    tmp_path: Path, values: list[Any], kind: pa.DataType, written: list[Any]
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"x": value}) + "\n" for value in [None] * 300 + values))
    types, found = through(path, "x")
    assert types["x"] == kind
    assert repr(to_array(found, kind).to_pylist()[300:]) == repr(written)


@pytest.mark.parametrize(
    ("one", "other", "both"),
    [
        (pa.int8(), pa.int32(), pa.int32()), (pa.uint8(), pa.int8(), pa.int16()), (pa.uint32(), pa.int8(), pa.int64()),
        (pa.float32(), pa.float64(), pa.float64()), (pa.string(), pa.large_string(), pa.large_string()),
        (pa.binary(2), pa.binary(), pa.binary()), (pa.decimal128(5, 2), pa.decimal128(9, 2), pa.decimal128(9, 2)),
        (pa.null(), pa.date32(), pa.date32()),
        (pa.uint64(), pa.int8(), None), (pa.int64(), pa.float64(), None), (pa.int64(), pa.string(), None),
        (pa.decimal128(5, 2), pa.decimal128(5, 3), None), (pa.timestamp("s"), pa.timestamp("ns"), None),
        (pa.date32(), pa.string(), None), (pa.bool_(), pa.int8(), None),
    ],
    ids=str,
)  # fmt: skip
def test_types_of_several_files_join_only_where_no_value_changes(
    tmp_path: Path, one: pa.DataType, other: pa.DataType, both: pa.DataType | None
) -> None:
    for name, kind in (("a", one), ("b", other)):
        pq.write_table(pa.table({"x": pa.nulls(1, kind)}), tmp_path / f"{name}.parquet")
    files, asked = find_inputs([str(tmp_path)]), Asked("x", "--id-column")
    if both is not None:
        assert decide_types(files, asked, [], Csv()) == {"x": both}
        return
    with pytest.raises(InputError, match=r"column 'x' is .* in .*a\.parquet and .* in .*b\.parquet: make"):
        decide_types(files, None, [asked], Csv())


def test_json_joins_csv_as_strings_and_parquet_by_its_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"x": 1}\n')
    (tmp_path / "b.csv").write_text("x\n1\n")
    asked = Asked("x", "--id-column")
    both = find_inputs([str(tmp_path / "a.jsonl"), str(tmp_path / "b.csv")])
    assert decide_types(both, asked, [], Csv()) == {"x": pa.string()}
    pq.write_table(pa.table({"x": pa.array([2], pa.int8())}), tmp_path / "c.parquet")
    numbers = find_inputs([str(tmp_path / "a.jsonl"), str(tmp_path / "c.parquet")])
    assert decide_types(numbers, asked, [], Csv()) == {"x": pa.int64()}


@pytest.mark.parametrize("kind", [pa.bool_(), pa.list_(pa.int8()), pa.struct([("a", pa.int8())])], ids=str)
def test_a_column_that_holds_no_ids_is_refused(tmp_path: Path, kind: pa.DataType) -> None:
    pq.write_table(pa.table({"x": pa.nulls(1, kind)}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"column 'x' of .*a\.parquet holds .*, not ids: choose another"):
        decide_types(find_inputs([str(tmp_path)]), Asked("x", "--id-column"), [], Csv())


@pytest.mark.parametrize("value", [None, "", b"", float("nan"), True, [1], {"a": 1}, "\ud83d"], ids=repr)
def test_what_is_no_id_is_named(value: Any) -> None:
    assert "id" in str(id_problem(value, "x"))


@pytest.mark.parametrize("value", ["a", 0, 0.5, b"\xff", MOMENT.date(), decimal.Decimal("1.10")], ids=repr)
def test_ids_may_be_of_many_types(value: Any) -> None:
    assert id_problem(value, "x") is None
