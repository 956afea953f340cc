"""The training guide's tables are those that the data make."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm2vec_fast.errors import UserError
from llm2vec_fast.training.settings.table import BEGIN, END, tables, write_tables
from llm2vec_fast.training.settings.verdicts import VERDICTS

GUIDE = Path(__file__).parents[4] / "docs" / "training.md"


def test_the_guide_has_the_tables_as_they_are_made() -> None:
    """Where this fails: python -m llm2vec_fast.training.settings docs/training.md"""
    assert f"{BEGIN}\n{tables()}{END}" in GUIDE.read_text(encoding="utf-8")


def test_every_setting_is_there_once() -> None:
    for name in VERDICTS:
        assert tables().count(f"`{name}`") == 1, name


def test_the_tables_are_put_between_its_marks_and_nowhere_else(tmp_path: Path) -> None:
    path = tmp_path / "guide.md"
    path.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_tables(path)
    assert path.read_text() == f"before\n{BEGIN}\n{tables()}{END}\nafter\n"
    path.write_text("no marks")
    with pytest.raises(UserError, match="has no place for the tables"):
        write_tables(path)
    assert path.read_text() == "no marks"
