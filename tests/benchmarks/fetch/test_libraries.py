"""What docstrings of libraries say, without what is said for machines."""

from pathlib import Path

import pytest

from benchmarks.fetch import libraries
from benchmarks.fetch.libraries import entries, prose

SOURCE = '''
"""Processes and what they write."""

class Reader:
    """
    Reads what a L{child process<some.where.Process>} writes to C{stdout}.

    @ivar size: how much
    """

    def __init__(self):
        """Make one from a process."""

    def readAll(self):
        """Read until the end of ``stdout``.

        Args:
            none
        """

    def _read(self):
        """Read some of it, which nobody calls."""

    def again(self):
        """Processes and what they write."""

    def terse(self):
        """Too short."""
'''


@pytest.mark.parametrize(
    ("paragraph", "expected"),
    [
        (
            "Reads what a L{child process<some.where.Process>}\nwrites to C{stdout}.",
            "Reads what a child process writes to stdout.",
        ),
        ("Made by :class:`Process <some.where.Process>` *itself*.", "Made by Process itself."),
        ("@ivar size: how much there is", ""),
        (":param size: how much there is", ""),
        ("Args:\n    size: how much there is", ""),
        ("Parameters\n----------\nsize of what is read", ""),
        (">>> read(size) and what follows", ""),
    ],
)
def test_marks_are_left_out_and_what_is_no_prose(paragraph: str, expected: str) -> None:
    assert prose(paragraph) == expected


def test_public_names_come_once_with_where_they_belong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("some/io.py", "some/tests/io.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(SOURCE.replace("Read until", f"{name} reads until"))
    monkeypatch.setattr(libraries, "PACKAGES", libraries.PACKAGES[:1])
    monkeypatch.setattr(libraries, "fetch", lambda package: tmp_path)
    assert [(entry.owner, entry.name, entry.summary, entry.rest) for entry in entries()] == [
        ("some", "io", "Processes and what they write.", ""),
        ("io", "Reader", "Reads what a child process writes to stdout.", "@ivar size: how much"),
        ("Reader", "readAll", "some/io.py reads until the end of stdout.", "Args:\n    none"),
    ]
