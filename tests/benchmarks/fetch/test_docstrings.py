"""The demo's texts: many, real, unique, in the same order each time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.fetch import docstrings


@pytest.fixture(scope="module")
def collected() -> list[docstrings.Docstring]:
    return docstrings.collect()


def test_there_are_thousands_and_none_is_empty(collected: list[docstrings.Docstring]) -> None:
    assert len(collected) >= 8_000
    assert all(each.text.strip() for each in collected)


def test_ids_and_texts_are_unique(collected: list[docstrings.Docstring]) -> None:
    assert len({each.id for each in collected}) == len(collected)
    assert len({each.text for each in collected}) == len(collected)


def test_ids_say_where_a_docstring_stands(collected: list[docstrings.Docstring]) -> None:
    texts = dict(collected)
    assert texts["subprocess.run"].startswith("Run command with arguments")
    assert texts["json.decoder.JSONDecoder.raw_decode"].startswith("Decode a JSON document")
    assert "delimiter" in texts["csv.Sniffer"]
    assert texts["math.sqrt"] == "Return the square root of x."  # from a module written in C


def test_tests_and_installed_packages_are_left_out(collected: list[docstrings.Docstring]) -> None:
    modules = {part for each in collected for part in each.id.split(".")[:-1]}
    assert modules.isdisjoint({"test", "tests", "idle_test", "site-packages", "pytest"})


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The file that another process wrote, with its own hash seed and imports, and what it printed."""
    file = tmp_path_factory.mktemp("elsewhere") / "new" / "docstrings.jsonl"
    program = (
        "import sys; from pathlib import Path; from benchmarks.fetch import docstrings;"
        "docstrings.write(Path(sys.argv[1])); print('this' in sys.modules)"
    )
    command = [sys.executable, "-c", program, str(file)]
    root = Path(docstrings.__file__).parents[2]
    return file, subprocess.run(command, check=True, cwd=root, capture_output=True, text=True).stdout


def test_another_process_collects_the_same_in_the_same_order(
    collected: list[docstrings.Docstring], elsewhere: tuple[Path, str]
) -> None:
    file, _ = elsewhere
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [(row["id"], row["text"]) for row in rows] == [tuple(each) for each in collected]
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_python_modules_are_read_without_being_imported(elsewhere: tuple[Path, str]) -> None:
    assert elsewhere[1] == "False\n"  # importing `this` would have printed a poem as well


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "docstrings.jsonl"
    file.write_text("old")

    def stop(*args: object, **kwargs: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(docstrings, "collect", lambda: [docstrings.Docstring("a", "b")])
    monkeypatch.setattr(docstrings.json, "dumps", stop)
    with pytest.raises(KeyboardInterrupt):
        docstrings.write(file)
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
