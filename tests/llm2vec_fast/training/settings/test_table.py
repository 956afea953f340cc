"""The training guide's table is the one that the data make."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm2vec_fast.errors import UserError
from llm2vec_fast.training.settings.table import BEGIN, END, table, write_table

GUIDE = Path(__file__).parents[4] / "docs" / "training.md"


def test_the_guide_has_the_table_as_it_is_made() -> None:
    """Where this fails: python -m llm2vec_fast.training.settings docs/training.md"""
    assert f"{BEGIN}\n{table()}{END}" in GUIDE.read_text(encoding="utf-8")


def test_the_table_is_put_between_its_marks_and_nowhere_else(tmp_path: Path) -> None:
    path = tmp_path / "guide.md"
    path.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_table(path)
    assert path.read_text() == f"before\n{BEGIN}\n{table()}{END}\nafter\n"
    path.write_text("no marks")
    with pytest.raises(UserError, match="has no place for the table"):
        write_table(path)
    assert path.read_text() == "no marks"
