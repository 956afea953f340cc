"""Compressed files: every member is read, and one that is damaged or goes on as something else is never cut short."""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from llm2vec_fast.data.columns import Columns
from llm2vec_fast.data.delimited import Csv
from llm2vec_fast.data.inputs import find_inputs
from llm2vec_fast.data.reading import open_reader, rows_of
from llm2vec_fast.errors import InputError

TEXTS = [f"text {number} é" for number in range(8_000)]
CONTENT = "".join(f"{text}\n" for text in TEXTS).encode()


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}
each = pytest.mark.parametrize(("suffix", "compress"), COMPRESS.items(), ids=[suffix[1:] for suffix in COMPRESS])
Compress = Callable[[bytes], bytes]


def read(path: Path, content: bytes) -> tuple[list[str], list[str | None]]:
    """The texts, and what is wrong with rows or the file."""
    path.write_bytes(content)
    [file] = find_inputs([str(path)])
    rows = list(rows_of(file, Columns().asked, Csv()))
    return [row.values[0] for row in rows if row.problem is None], [row.problem for row in rows if row.problem]


@each
def test_all_members_are_read(tmp_path: Path, suffix: str, compress: Compress) -> None:
    half = CONTENT.index(b"text 4000")
    content = compress(CONTENT[:half]) + compress(b"") + compress(CONTENT[half:])
    assert read(tmp_path / f"a.txt{suffix}", content) == (TEXTS, [])


@each
@pytest.mark.parametrize("damage", ["cut", "cut-late", "garbage-behind", "damaged-member-behind"])
def test_a_damaged_file_is_named_and_gives_what_it_holds(
    tmp_path: Path, suffix: str, compress: Compress, damage: str
) -> None:
    whole = compress(CONTENT)
    content = {
        "cut": whole[: len(whole) // 2],
        "cut-late": whole[:-1],
        "garbage-behind": whole + b"garbage",
        "damaged-member-behind": whole + whole[:20] + b"\xff" * 40 + whole[60:],
    }[damage]
    texts, problems = read(tmp_path / f"a.txt{suffix}", content)
    assert texts == TEXTS[: len(texts)]
    [problem] = problems
    assert problem is not None
    assert problem.startswith(f"from row {len(texts) + 1} on the file cannot be read: ")


@each
def test_a_reader_goes_on_in_the_middle(tmp_path: Path, suffix: str, compress: Compress) -> None:
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(compress(CONTENT))
    [file] = find_inputs([str(path)])
    first = open_reader(file, Columns().asked, Csv())
    for _, _row in zip(range(6_000), first, strict=False):
        pass
    first.close()
    rest = open_reader(file, Columns().asked, Csv(), 6_000, first.offset, first.line)
    assert [row.values[0] for row in rest] == TEXTS[first.line :]
    rest.close()


@each
def test_a_name_that_promises_another_compression_is_told(tmp_path: Path, suffix: str, compress: Compress) -> None:
    (tmp_path / "a.jsonl").write_bytes(compress(CONTENT))
    with pytest.raises(InputError, match=rf"a\.jsonl is compressed by \w+: let its name end in {suffix}"):
        read(tmp_path / "a.jsonl", compress(CONTENT))


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.txt", "é text\n".encode("utf-16"), "a.txt is UTF-16: convert it to UTF-8"),
        ("a.jsonl", '{"text": "a"}\n'.encode("utf-16-be"), "a.jsonl is no text, or UTF-16: convert it to UTF-8"),
        ("a.csv.gz", gzip.compress("text\né\n".encode("utf-16"), mtime=0), "a.csv.gz is UTF-16"),
        ("a.json", '[{"text": "a"}]'.encode("utf-16"), "a.json is UTF-16"),
        ("a.csv", b"PK\x03\x04 a workbook", "a.csv is a zip archive or a spreadsheet"),
        ("a.jsonl", b"PAR1 rows", "a.jsonl is a Parquet file: let its name end in .parquet"),
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a.txt is a git-lfs pointer, not the"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a.parquet is a git-lfs pointer"),
    ],
)
def test_a_file_that_is_something_else_is_called_that(tmp_path: Path, name: str, content: bytes, told: str) -> None:
    with pytest.raises(InputError) as caught:
        read(tmp_path / name, content)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", b"one\rtwo\r"), ("a.csv", b"text\rone\rtwo\r"), ("a.jsonl", b'{"text": "one"}\r{"text": "two"}\r'),
        ("a.csv.gz", gzip.compress(b"text\rone\rtwo", mtime=0)), ("a.txt", b"one\r\ntwo\r\n"),
    ],
)  # fmt: skip
def test_line_ends_may_be_those_of_a_mac_or_of_dos(tmp_path: Path, name: str, content: bytes) -> None:
    assert read(tmp_path / name, content) == (["one", "two"], [])
