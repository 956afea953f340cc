"""Plain text: a text a line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from llm2vec_fast.data.columns import require_columns
from llm2vec_fast.data.inputs import InputFile
from llm2vec_fast.data.lines import Lines
from llm2vec_fast.data.rows import Asked, Row

NAME = "text"


class TextReader:
    """A text a line; its only column is "text", whatever the text column of other files is called."""

    names = (NAME,)

    def __init__(
        self, file: InputFile, asked: Sequence[Asked], offset: int = 0, line: int = 0, whole: bool = False
    ) -> None:
        require_columns(file.shown, [each for each in asked if not each.text], self.names)
        self._asked, self._whole = asked, whole
        self._lines = Lines(file, offset, line)
        self.offset, self.line = offset, line
        self.consumed = self._lines.consumed
        self.close = self._lines.close

    def __iter__(self) -> Iterator[Row]:
        for content in self._lines:
            text = content.rstrip("\r\n")
            self.offset, self.line = self._lines.offset, self._lines.number
            if self._whole:
                values = [{NAME: text}]
            else:
                values = [text if each.text or each.name == NAME else None for each in self._asked]
            yield Row(values, self._lines.forget(), line=self.line)
