"""Odd tables, written in every format by writers that are not ours, come through all three commands unchanged, or the
row is named."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_encoder import FakeEncoder
from folders import errors, table
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from llm2vec_fast.bulk.job import embed
from llm2vec_fast.bulk.settings import EmbedSettings
from llm2vec_fast.data.delimited import Csv
from llm2vec_fast.data.pairs import PairColumns
from llm2vec_fast.errors import UserError
from llm2vec_fast.mining import MiningSettings, mine
from llm2vec_fast.training import pairs as training_pairs
from llm2vec_fast.training.texts import read_texts

FORMATS = ("jsonl", "ndjson.zst", "json", "json.gz", "csv", "csv.bz2", "tsv", "tsv.xz", "parquet")
ODD = (
    *("", " ", "\n", "NA", "null", "nan", "true", "1.0", "007", "1e5", "2024-01-02", "2024-01-02T03:04:05Z", "b'x'"),
    *('"', '"quoted"', 'a "b" c', '"open', "it's", "\\", '\\"', "a,b", "a;b", "a\tb", "|", "two\nlines", "cr\rhere"),
    *("\ufeffmark", "é", "猫", "👩‍👩‍👧", "a\u2028b", "a\x85b", "\x1c", "[1, 2]", '{"a": 1}', "sep=,", "=1+1"),
)
HALF = "half \ud83d"  # only an escape of JSON can say it
text = st.sampled_from(ODD) | st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=8)
NUMBERS = st.one_of(
    st.lists(st.integers(-(2**63), 2**63 - 1), min_size=6, max_size=6),
    st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=6, max_size=6),
)


class Table(NamedTuple):
    """Rows of a key, a query, a positive and a number."""

    rows: list[dict[str, Any]]
    column: str = "number"


@st.composite
def tables(draw: st.DrawFn) -> Table:
    rows = draw(st.lists(st.tuples(text, text), min_size=1, max_size=6))
    numbers, keys = draw(NUMBERS), draw(st.sampled_from(["k{}", "{}", "2024-01-0{}", '"{}"']))
    return Table([
        {"key": keys.format(i + 1), "query": query, "positive": positive, "number": number}
        for i, ((query, positive), number) in enumerate(zip(rows, numbers, strict=False))
    ])  # fmt: skip


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


COMPRESS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd}


def write(folder: Path, kind: str, found: Table) -> Path:
    path, (first, _, compression) = folder / f"table.{kind}", kind.partition(".")
    if first == "parquet":
        pq.write_table(pa.Table.from_pylist(found.rows), path, row_group_size=2)
        return path
    if first in ("jsonl", "ndjson"):
        content = "".join(json.dumps(row) + "\n" for row in found.rows)
    elif first == "json":
        content = json.dumps(found.rows, indent=1, ensure_ascii=False)
    else:
        content = delimited(found.rows, "\t" if first == "tsv" else ",")
    path.write_bytes(COMPRESS.get(compression, bytes)(content.encode()))
    return path


def delimited(rows: list[dict[str, Any]], delimiter: str) -> str:
    sink = io.StringIO(newline="")
    writer = csv.DictWriter(sink, list(rows[0]), delimiter=delimiter, quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(rows)
    return sink.getvalue()


@pytest.fixture(scope="module")
def model() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        for name, content in {"config.json": "{}", "model.safetensors": "weights", "tokenizer.json": "{}"}.items():
            Path(folder, name).write_text(content)
        yield Path(folder)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the datasets library keeps."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def whole(*texts: str) -> bool:
    return all(each.strip() and "\ud83d" not in each for each in texts)


@pytest.mark.parametrize("kind", FORMATS)
@settings(
    max_examples=6, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(found=tables(), half=st.booleans())
def test_every_row_comes_through_all_commands_or_is_named(model: Path, kind: str, found: Table, half: bool) -> None:
    rows = found.rows
    if half and kind in ("jsonl", "ndjson.zst"):
        rows = [*rows, {**rows[0], "key": "half", "query": HALF, "positive": "p"}]
        rows = [*rows, {**rows[0], "key": "kept", "query": "q", "positive": HALF}]
    typed = kind.split(".")[0] not in ("csv", "tsv")
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), kind, Table(rows))
        numbers = [row["number"] if typed else str(row["number"]) for row in rows]
        embedded(Path(folder), path, model, rows, numbers)
        mined(Path(folder), path, model, rows, numbers)
        trained(path, rows)


def embedded(folder: Path, path: Path, model: Path, rows: list[dict[str, Any]], numbers: list[Any]) -> None:
    good = [i for i, row in enumerate(rows) if whole(row["query"]) and "\ud83d" not in row["positive"]]
    columns = {"text_column": "query", "id_column": "key", "keep_columns": ("query", "positive", "number")}
    options = EmbedSettings(str(model), rows_per_shard=3, csv_quote='"', **columns)
    if not good:
        with pytest.raises(UserError, match="no row could be embedded"):
            embed([str(path)], folder / "out", options, load=lambda settings: FakeEncoder())
    else:
        embed([str(path)], folder / "out", options, load=lambda settings: FakeEncoder())
        out = table(folder / "out").drop_columns("embedding").to_pylist()
        wanted = [(*(rows[i][name] for name in ("key", "query", "positive")), numbers[i]) for i in good]
        assert repr([tuple(row.values()) for row in out]) == repr(wanted)
    assert [each["row"] for each in errors(folder / "out")] == [i + 1 for i in range(len(rows)) if i not in good]


def mined(folder: Path, path: Path, model: Path, rows: list[dict[str, Any]], numbers: list[Any]) -> None:
    good = [i for i, row in enumerate(rows) if whole(row["query"], row["positive"])]
    chosen = MiningSettings(EmbedSettings(str(model), device="cpu", csv_quote='"'), share=1.0, id_column="key")
    run = {"load": lambda settings: FakeEncoder()}
    if not good:
        with pytest.raises(UserError, match="has no row with a text in 'query' and in 'positive'"):
            mine([str(path)], folder / "mined.jsonl", chosen, **run)
        return
    mine([str(path)], folder / "mined.jsonl", chosen, **run)
    lines = [json.loads(line) for line in (folder / "mined.jsonl").read_bytes().decode().split("\n")[:-1]]
    wanted = [{**rows[i], "number": numbers[i]} for i in good]
    assert repr([{name: line[name] for name in rows[0]} for line in lines]) == repr(wanted)
    listing = folder / "mined.jsonl.errors.jsonl"
    listed = [json.loads(line)["row"] for line in listing.read_text().splitlines()] if listing.exists() else []
    assert listed == [i + 1 for i in range(len(rows)) if i not in good]


def trained(path: Path, rows: list[dict[str, Any]]) -> None:
    how, said = Csv(quote='"'), []
    good = [row["query"] for row in rows if whole(row["query"])]
    if good:
        assert read_texts([str(path)], "query", how, notify=said.append)["text"][:] == good
        assert [f"{len(rows) - len(good)} of {len(rows)}" in sentence for sentence in said] == [True] * len(said)
        assert len(said) == (len(good) < len(rows))
    columns = PairColumns(id="key")
    arguments = {"files": tuple(training_pairs.find_inputs([str(path)])), "columns": columns, "csv": how, "code": ""}
    found = list(training_pairs._pairs(**arguments))
    assert [each["problem"] is None for each in found] == [whole(row["query"], row["positive"]) for row in rows]
    for each, row in zip(found, rows, strict=True):
        if each["problem"] is None:
            assert (each["query"], each["positives"], each["name"]) == (row["query"], [row["positive"]], row["key"])
