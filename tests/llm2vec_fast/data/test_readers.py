"""Every format gives its rows in order, from any row on, and says of a bad row what is wrong and where."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm2vec_fast.data import delimited, lines
from llm2vec_fast.data.columns import Columns
from llm2vec_fast.data.delimited import Csv
from llm2vec_fast.data.inputs import InputFile, find_inputs
from llm2vec_fast.data.reading import open_reader
from llm2vec_fast.data.rows import RowReader
from llm2vec_fast.errors import InputError


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


COMPRESS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}
TEXTS = [f"text {number} " + "é" * (number % 7) for number in range(1200)]
FORMATS = [f"{kind}{suffix}" for kind in ("txt", "jsonl", "json", "csv", "tsv") for suffix in COMPRESS] + ["parquet"]


def write(path: Path, texts: list[Any], ids: list[Any] | None = None, title: list[Any] | None = None) -> InputFile:
    """A file of the format that its name tells, with columns text, key and title; plain text has only the first."""
    kind, compression = path.name.split(".")[1], path.suffix if path.suffix in COMPRESS else ""
    keys = ids or [f"key{number}" for number in range(len(texts))]
    titles = title or [f"a, “title”\nof {number}" for number in range(len(texts))]
    records = [{"key": k, "text": t, "title": h} for k, t, h in zip(keys, texts, titles, strict=True)]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(records), path, row_group_size=100)
        return described(path)
    if kind == "txt":
        content = "".join(f"{text}\n" for text in texts)
    elif kind == "json":
        content = json.dumps(records, indent=1)
    elif kind == "jsonl":
        content = "".join(json.dumps(record) + "\n" for record in records)
    else:
        with open(path.with_suffix(".plain"), "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["key", "text", "title"], delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(records)
        content = path.with_suffix(".plain").read_bytes().decode()
    path.write_bytes(COMPRESS[compression](content.encode()))
    return described(path)


def described(path: Path) -> InputFile:
    return find_inputs([str(path)])[0]


class Read(NamedTuple):
    """A row by its roles."""

    text: Any
    id: Any
    kept: list[Any]
    problem: str | None
    rows: int
    damaged: bool
    line: int | None


QUOTED = Csv(quote='"')


def reader_of(file: InputFile, columns: Columns, *where: int, how: Csv = QUOTED) -> RowReader:
    return open_reader(file, columns.asked, how, *where)


def rows_of(file: InputFile, columns: Columns = Columns(), *where: int, how: Csv = QUOTED) -> list[Read]:  # noqa: B008
    reader = reader_of(file, columns, *where, how=how)
    found = []
    for row in reader:
        values = list(row.values)
        text, identifier = values.pop(0), values.pop(0) if columns.id else None
        found.append(Read(text, identifier, values, row.problem, row.rows, row.damaged, row.line))
    reader.close()
    return found


def problems_of(path: Path, content: bytes, columns: Columns = Columns()) -> dict[int, str | None]:  # noqa: B008
    """What is wrong with each row that is bad, by 1-based row."""
    path.write_bytes(content)
    return {number: row.problem for number, row in enumerate(rows_of(described(path), columns), 1) if row.problem}


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_all_texts_in_order(tmp_path: Path, kind: str) -> None:
    rows = rows_of(write(tmp_path / f"corpus.{kind}", TEXTS))
    assert [row.text for row in rows] == TEXTS
    assert not any(row.problem for row in rows)


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if not kind.startswith("txt")])
def test_id_and_kept_columns_come_with_the_text(tmp_path: Path, kind: str) -> None:
    columns = Columns("text", "key", ("title", "text"))
    rows = rows_of(write(tmp_path / f"corpus.{kind}", TEXTS[:3]), columns)
    assert [row.id for row in rows] == ["key0", "key1", "key2"]
    assert [row.kept for row in rows] == [[f"a, “title”\nof {number}", TEXTS[number]] for number in range(3)]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("done", [1, 99, 100, 777, 1200])
def test_a_reader_goes_on_where_another_stopped(tmp_path: Path, kind: str, done: int) -> None:
    file = write(tmp_path / f"corpus.{kind}", TEXTS)
    straight = rows_of(file)
    first = reader_of(file, Columns())
    rows = iter(first)
    for _ in range(done):
        next(rows)
    first.close()
    assert rows_of(file, Columns(), done, first.offset, first.line) == straight[done:]


def test_parquet_does_not_read_row_groups_that_are_done(tmp_path: Path) -> None:
    file = write(tmp_path / "corpus.parquet", TEXTS)
    damage(Path(file.path), group=3)
    assert [row.text for row in rows_of(file, Columns(), 450)] == TEXTS[450:]


def damage(path: Path, group: int) -> None:
    """Overwrite the pages of one row group; the footer stays whole."""
    chunks = pq.read_metadata(path).row_group(group)
    starts = [
        chunks.column(index).dictionary_page_offset or chunks.column(index).data_page_offset for index in range(3)
    ]
    content = bytearray(path.read_bytes())
    content[min(starts) : max(starts) + 40] = b"\xff" * (max(starts) + 40 - min(starts))
    path.write_bytes(bytes(content))


def test_a_damaged_row_group_costs_its_own_rows_only(tmp_path: Path) -> None:
    file = write(tmp_path / "corpus.parquet", TEXTS)
    damage(Path(file.path), group=3)
    rows = rows_of(file)
    bad = [row for row in rows if row.problem]
    assert [(row.rows, row.damaged) for row in bad] == [(100, True)]
    assert "rows 301 to 400 cannot be read" in str(bad[0].problem)
    assert [row.text for row in rows if not row.problem] == TEXTS[:300] + TEXTS[400:]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet"])
@pytest.mark.parametrize(
    "columns", [Columns("body"), Columns("text", "uid"), Columns("text", None, ("lang",))], ids=str
)
def test_a_missing_column_is_refused_with_those_there_are(tmp_path: Path, kind: str, columns: Columns) -> None:
    file = write(tmp_path / f"corpus.{kind}", TEXTS[:3])
    with pytest.raises(InputError, match=r"has no column '(body|uid|lang)'.*'key', 'text', 'title'"):
        reader_of(file, columns)


def test_plain_text_has_only_a_text_column(tmp_path: Path) -> None:
    file = write(tmp_path / "corpus.txt", TEXTS[:3])
    assert len(rows_of(file, Columns("body"))) == 3  # a text column is that of the other files of a mixed corpus
    with pytest.raises(InputError, match=r"no column 'key' \(--id-column\): its columns are 'text'"):
        reader_of(file, Columns("text", "key"))


def test_a_field_missing_in_one_json_row_is_a_bad_row(tmp_path: Path) -> None:
    found = problems_of(tmp_path / "corpus.jsonl", b'{"text": "a"}\n{"body": "b"}\n')
    assert found == {2: "the row has no field 'text', only 'body'"}


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv"])
def test_a_byte_that_is_not_utf8_is_a_bad_row_with_its_place(tmp_path: Path, kind: str) -> None:
    head = {"txt": b"", "jsonl": b"", "csv": b"text\n"}[kind]
    row = {"txt": b"%s\n", "jsonl": b'{"text": "%s"}\n', "csv": b"%s\n"}[kind]
    content = head + row % b"good" + row % b"caf\xe9" + row % b"good"
    place = content.index(b"\xe9")
    found = problems_of(tmp_path / f"corpus.{kind}", content)
    assert found == {2: f"byte 0xe9 at byte {place} of the file is not UTF-8"}


@pytest.mark.parametrize("line", ["{", "[1, 2]", '"text"', "", "1" * 5000, "[" * 100_000], ids=lambda line: line[:9])
def test_a_broken_json_line_is_a_bad_row(tmp_path: Path, line: str) -> None:
    content = f'{{"text": "a"}}\n{line}\n{{"text": "b"}}\n'.encode()
    assert list(problems_of(tmp_path / "corpus.jsonl", content)) == [2]


def test_a_json_row_keeps_values_of_any_kind(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"text": "a", "n": {"x": [1, null]}}\n{"text": "b"}\n')
    assert [row.kept for row in rows_of(described(path), Columns("text", None, ("n",)))] == [[{"x": [1, None]}], [None]]


def test_a_csv_record_of_the_wrong_width_is_a_bad_row(tmp_path: Path) -> None:
    found = problems_of(tmp_path / "corpus.csv", b"id,text\n1,a\n2\n3,b,c\n4,d\n")
    assert found == {2: "the record has 1 fields, the header has 2", 3: "the record has 3 fields, the header has 2"}


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_a_csv_file_may_use_other_delimiters(tmp_path: Path, delimiter: str) -> None:
    path = tmp_path / "corpus.csv"
    path.write_text(f"id{delimiter}text\n1{delimiter}a, b\n")
    assert [row.text for row in rows_of(described(path))] == ["a, b"]


def test_a_byte_order_mark_and_dos_line_ends_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbftext,id\r\none,1\r\ntwo,2\r\n")
    for name in ("a.txt", "a.csv"):
        assert [row.text for row in rows_of(described(tmp_path / name))] == ["one", "two"]


def test_a_line_that_no_text_is_as_long_as_is_a_bad_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "MAX_ROW_BYTES", 100)
    found = problems_of(tmp_path / "corpus.txt", b"short\n" + b"x" * 350 + b"\nshort\n")
    assert found.keys() == {2}
    assert "the line that starts at byte 6 of the file is longer than" in str(found[2])


def test_a_quote_that_is_never_closed_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delimited, "MAX_ROW_BYTES", 1000)
    found = problems_of(tmp_path / "corpus.csv", b'text\ngood\n"open\n' + b"line\n" * 400)
    assert found == {
        2: "the quote that opens in line 3 is not closed within 0 MiB: the file is not read from line 3 on"
    }


def test_a_parquet_column_that_is_not_text_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "corpus.parquet")
    with pytest.raises(InputError, match=r"column 'text' of .* holds int64, not text"):
        reader_of(described(tmp_path / "corpus.parquet"), Columns())


@pytest.mark.parametrize("kind", ["string", "large_string", "binary", "string_view", "dictionary"])
def test_parquet_text_of_any_type_is_read(tmp_path: Path, kind: str) -> None:
    types = {"dictionary": pa.dictionary(pa.int32(), pa.string()), "string_view": pa.string_view()}
    column = pa.array(["a", None, "b"]).cast(types.get(kind) or getattr(pa, kind)())
    pq.write_table(pa.table({"text": column}), tmp_path / "corpus.parquet")
    texts = [row.text for row in rows_of(described(tmp_path / "corpus.parquet"))]
    assert [text.decode() if isinstance(text, bytes) else text for text in texts] == ["a", None, "b"]


def test_a_file_that_is_no_parquet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "corpus.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(InputError, match=r"corpus\.parquet is not a Parquet file that can be read: "):
        reader_of(described(tmp_path / "corpus.parquet"), Columns())


def test_parquet_columns_with_dots_in_their_names(tmp_path: Path) -> None:
    """A name of its own goes before a field inside another; lists, and fields whose names have dots, are found."""
    table = pa.table({
        "a": [{"b": "inner", "x.y": 1, "deep": {"t": "d"}}, None], "a.b": ["own", "own"], "aa": ["other", "other"],
        "l.i.s": [["x"], []], "text": ["t", "u"],
    })  # fmt: skip
    pq.write_table(table, tmp_path / "a.parquet")
    file = described(tmp_path / "a.parquet")
    rows = rows_of(file, Columns("text", None, ("a.b", "a.x.y", "a.deep.t", "aa", "l.i.s")))
    assert rows[0].kept[:4] == ["own", 1, "d", "other"]
    assert rows[0].kept[4].to_pylist() == [["x"]]
    assert rows[1].kept[:4] == ["own", None, None, "other"]
    with pytest.raises(InputError, match=r"has no column 'a\.c'"):
        reader_of(file, Columns("a.c"))
