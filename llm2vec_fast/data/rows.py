"""A row as it is read: the values of the columns asked for, its place, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

MAX_ROW_BYTES = 64 << 20  # a longer line or field is a bad row: no text is, and memory stays bounded
SHOWN_PROBLEMS = 3


class Asked(NamedTuple):
    """A column that is asked for.

    ``option`` is what the user calls it by. Files may lack one that is not ``required``, its values are None then. The
    ``text`` of a plain text file is its lines, whatever the column is called in other files.
    """

    name: str
    option: str
    required: bool = True
    text: bool = False


class Row(NamedTuple):
    """``values`` of the columns asked for, in their order. ``problem`` says why the row is unusable; where the file is
    damaged it stands for ``rows`` rows. ``line`` is the line (from 1) where it begins, None in files without lines."""

    values: Sequence[Any] = ()
    problem: str | None = None
    rows: int = 1
    damaged: bool = False
    line: int | None = None


class RowReader(Protocol):
    """Iterates over rows; after any, ``offset`` and ``line`` are where a later reader starts, with the rows so far."""

    offset: int
    line: int

    def __iter__(self) -> Iterator[Row]: ...

    def consumed(self) -> int:
        """Bytes of the file on disk that the rows so far took, roughly."""
        ...

    def close(self) -> None: ...


class Problem(NamedTuple):
    """A row (from 1) that is left out, and why; ``rows`` rows where one damage hides several. ``line`` is where it
    begins, None in files without lines."""

    file: str
    row: int
    id: Any
    reason: str
    rows: int = 1
    damage: bool = False
    line: int | None = None

    @property
    def place(self) -> str:
        """FILE:LINE, or FILE row N where there are no lines."""
        return f"{self.file} row {self.row}" if self.line is None else f"{self.file}:{self.line}"

    def as_json(self, **more: Any) -> dict[str, Any]:
        """The problem as an object of a file that lists such."""
        value = {**more, "file": self.file, "row": self.row, "line": self.line, "id": self.id, "reason": self.reason}
        if self.line is None:
            del value["line"]
        if self.rows != 1:
            value["rows"] = self.rows
        return value


@dataclass
class LeftOut:
    """Rows that are left out: how many of how many, and the first of them."""

    rows: int = 0
    count: int = 0

    def __post_init__(self) -> None:
        self.first: list[Problem] = []

    def add(self, problems: Iterable[Problem]) -> None:
        for problem in problems:
            self.count += problem.rows
            if len(self.first) < SHOWN_PROBLEMS:
                self.first.append(problem)

    def sentence(self, where: str | None = None, what: str = "them all") -> str:
        """ "3 of 200 rows are left out: a.jsonl:7 (the text is null), …; errors.jsonl lists them all"."""
        shown = ", ".join(f"{problem.place} ({problem.reason})" for problem in self.first)
        more = ", …" if self.count > len(self.first) else ""
        verb = "is" if self.count == 1 else "are"
        listed = f"; {where} lists {what}" if where and more else ""
        return f"{self.count:,} of {self.rows:,} rows {verb} left out: {shown}{more}{listed}"


def text_of(value: Any, what: str = "text") -> tuple[str, str | None]:
    """A value as a text, and what is wrong with it as one; ``what`` it is called.

    Bytes are UTF-8. A text holds something else than white space, and whole characters.
    """
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            return "", f"byte 0x{value[error.start]:02x} at byte {error.start} of the {what} is not UTF-8"
    if value is None:
        return "", f"the {what} is null"
    if not isinstance(value, str):
        return "", f"the {what} is not a string but {type(value).__name__} {str(value)[:40]!r}"
    if not value or value.isspace():
        return "", f"the {what} is empty"
    wrong = half_character(value, what)
    return ("" if wrong else value), wrong


def half_character(text: str, what: str) -> str | None:
    """What is wrong with a text that holds half a surrogate pair, as only an escape of JSON can write it."""
    if text.isascii():
        return None
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"the {what} holds half a surrogate pair (U+{ord(text[error.start]):04X}), which is not text"
    return None
