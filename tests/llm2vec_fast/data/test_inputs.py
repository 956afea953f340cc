"""Files, folders and globs become one reproducible list of files with stable names."""

from __future__ import annotations

import os
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
    return [file.name for file in find_inputs([str(pattern) for pattern in patterns], [exclude])]


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


def told(*patterns: object) -> list[str]:
    said: list[str] = []
    find_inputs([str(pattern) for pattern in patterns], notify=said.append)
    return said


def test_what_a_folder_or_glob_passes_over_is_said(corpus: Path) -> None:
    for name in ("a.md", "b.md", "c.md", "d.md", "README", "x.tar.gz", "_SUCCESS", ".DS_Store"):
        (corpus / name).write_bytes(b"x")
    (corpus / "gone.txt").symlink_to(corpus / "nothing")
    (corpus / "settings.json").write_text('{\n"a": 1\n}\n')
    [sentence] = told(corpus)
    passed = [
        "4 .md (a.md, b.md, c.md, …)",
        "1 .json of one object, no rows (settings.json)",
        "1 .pdf (notes.pdf)",
        "1 .tar.gz (x.tar.gz)",
        "1 links to nothing (gone.txt)",
        "1 of a name that begins with _ (_SUCCESS)",
        "1 without an ending (README)",
    ]
    assert sentence == f"{corpus}: 10 are passed over: {'; '.join(passed)}"
    [of_glob] = told(corpus / "*")
    assert "2 folders (deep, out)" in of_glob
    assert "notes.pdf" in of_glob
    assert told(corpus / "*.txt") == [f"{corpus / '*.txt'}: 1 is passed over: 1 links to nothing (gone.txt)"]
    assert told(corpus / "b.txt") == []


def test_a_list_or_lines_in_a_json_file_of_a_folder_are_read(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text('[{"text": "a"}]')
    (tmp_path / "lines.json").write_text('{"text": "a"}\n{"text": "b"}\n')
    (tmp_path / "bad-line.json").write_text('{"text": \n{"text": "b"}\n')
    assert names(tmp_path) == ["bad-line.json", "lines.json", "list.json"]


def test_folders_behind_links_are_read_as_by_globs(corpus: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "x.txt").write_text("x")
    (corpus / "link").symlink_to(other, target_is_directory=True)
    assert "link/x.txt" in names(corpus)
    assert set(names(corpus / "**" / "*.txt")) >= {"link/x.txt", "b.txt"}


@pytest.mark.parametrize("pattern", ["", "**/*.txt"])
def test_links_that_go_round_are_refused_by_name(corpus: Path, pattern: str) -> None:
    (corpus / "deep" / "round").symlink_to(corpus, target_is_directory=True)
    with pytest.raises(InputError, match=r"the link .*deep/round leads back to .*corpus|the link .* above it"):
        names(corpus / pattern)


def test_links_that_go_round_through_each_other_are_refused(tmp_path: Path) -> None:
    for one, other in (("a", "b"), ("b", "a")):
        (tmp_path / one).mkdir(exist_ok=True)
        (tmp_path / other).mkdir(exist_ok=True)
        (tmp_path / one / "to").symlink_to(tmp_path / other, target_is_directory=True)
    with pytest.raises(InputError, match="round and round"):
        names(tmp_path / "a")


def test_the_home_folder_may_be_a_tilde(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(corpus))
    assert names("~/b.txt") == names("~/*.txt") == ["b.txt"]
    assert "deep/d.parquet" in names("~")


def test_a_name_that_is_not_utf8_is_escaped(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/caf\xe9.txt"
    with open(path, "wb") as file:
        file.write(b"a\n")
    [found] = find_inputs([str(tmp_path)])
    assert found.name == "caf\\xe9.txt"
    assert os.fsencode(found.path) == path
    assert found.shown.isascii()


def test_what_is_no_plain_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(InputError, match=r"pipe\.txt is no file that can be read twice"):
        names(tmp_path / "pipe.txt")
    (tmp_path / "to.txt").symlink_to(tmp_path / "nothing.txt")
    with pytest.raises(InputError, match=r"to\.txt is a link to .*nothing\.txt, which does not exist"):
        names(tmp_path / "to.txt")
