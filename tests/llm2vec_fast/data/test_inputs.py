"""Files, folders and globs become one reproducible list of files with stable names."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm2vec_fast.data.inputs import find_inputs
from llm2vec_fast.errors import InputError


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    for name in (
        "b.txt",
        "a.jsonl",
        "deep/er/c.csv.gz",
        "deep/d.parquet",
        ".hidden/e.txt",
        "notes.pdf",
        "out/part.parquet",
    ):
        path = tmp_path / "corpus" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return tmp_path / "corpus"


def names(*patterns: object, exclude: Path = Path("nowhere")) -> list[str]:
    return [file.name for file in find_inputs([str(pattern) for pattern in patterns], exclude)]


def test_a_folder_gives_its_known_files_sorted_and_never_the_output(corpus: Path) -> None:
    assert names(corpus, exclude=corpus / "out") == ["a.jsonl", "b.txt", "deep/d.parquet", "deep/er/c.csv.gz"]


def test_globs_reach_into_folders(corpus: Path) -> None:
    assert names(corpus / "**" / "*.parquet", exclude=corpus / "out") == ["d.parquet"]


def test_names_do_not_depend_on_where_the_command_runs(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absolute = names(corpus / "b.txt", corpus / "deep")
    monkeypatch.chdir(corpus)
    assert names("b.txt", "deep") == absolute == ["b.txt", "deep/d.parquet", "deep/er/c.csv.gz"]


def test_arguments_keep_their_order_and_a_file_met_twice_is_read_once(corpus: Path) -> None:
    assert names(corpus / "b.txt", corpus / "a.jsonl", corpus / "*.txt") == ["b.txt", "a.jsonl"]


def test_a_link_has_the_format_that_its_own_name_tells(corpus: Path) -> None:
    (corpus / "blob").write_text("x")
    (corpus / "link.txt").symlink_to(corpus / "blob")
    assert names(corpus / "link.txt") == ["link.txt"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("missing.txt", "does not exist"),
        ("notes.pdf", "format that its name does not tell"),
        ("*.pdf", "matches no file"),
        ("deep/er/x.parquet.gz", "format"),
        ("empty", "holds no file to read"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(corpus: Path, pattern: str, message: str) -> None:
    (corpus / "empty").mkdir()
    (corpus / "deep/er/x.parquet.gz").write_bytes(b"x")
    with pytest.raises(InputError, match=message) as error:
        names(corpus / pattern)
    assert Path(pattern).name in str(error.value)
