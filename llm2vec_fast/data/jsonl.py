"""JSON: an object a line, or one list of objects, which is never held whole."""

from __future__ import annotations

import codecs
import json
from collections.abc import Generator, Iterator, Sequence
from itertools import islice
from typing import Any

from llm2vec_fast.data.columns import names_in, object_of, repeated_in, require_columns, value_in
from llm2vec_fast.data.inputs import InputFile
from llm2vec_fast.data.lines import Lines
from llm2vec_fast.data.rows import MAX_ROW_BYTES, Asked, Row, RowReader
from llm2vec_fast.data.sniffing import head_of, is_json_list, is_one_object, what_it_is_instead
from llm2vec_fast.data.streams import CHUNK_BYTES, DAMAGE, ByteStream
from llm2vec_fast.errors import InputError

SAMPLED_ROWS = 10_000  # to tell a wrong column name from rows that lack the field
Record = dict[str, Any]
_Sample = Generator[tuple[Record, str | None], None, None]


def json_reader(file: InputFile, asked: Sequence[Asked], row: int, offset: int, line: int, whole: bool) -> RowReader:
    """The reader that a file of JSON needs, whatever its ending.

    Raises:
        InputError: it is one object, or lacks a column.
    """
    if is_json_list(file.path, file.compression):
        return JsonListReader(file, asked, row, whole)
    if file.format == "json" and is_one_object(file.path, file.compression):
        head = head_of(file.path, file.compression).strip()
        if b"\n" in head:
            raise InputError(f"{file.shown} is one JSON object: write its rows as a list of objects, or one a line")
    return JsonLinesReader(file, asked, offset, line, whole)


class JsonLinesReader:
    """A JSON object a line. Blank lines count as rows, so that a row's number is its line's, and are bad rows."""

    def __init__(
        self, file: InputFile, asked: Sequence[Asked], offset: int = 0, line: int = 0, whole: bool = False
    ) -> None:
        self._asked, self._whole = asked, whole
        self.offset, self.line = offset, line
        if offset == 0:
            _require_columns(file, asked, self._sampled(file))
        self._lines = Lines(file, offset, line)
        self.consumed = self._lines.consumed
        self.close = self._lines.close

    def __iter__(self) -> Iterator[Row]:
        for content in self._lines:
            self.offset, self.line = self._lines.offset, self._lines.number
            record, problem = parse_object(content, self._lines.forget(), "line")
            yield row_of(record, problem, self._asked, self.line, self._whole)

    def _sampled(self, file: InputFile) -> _Sample:
        lines = Lines(file)
        try:
            for content in lines:
                yield parse_object(content, lines.forget(), "line")
        finally:
            lines.close()


class JsonListReader:
    """One list of objects. An element that is no JSON ends where its brackets close; where none does, the rest of the
    file is damaged."""

    offset = 0

    def __init__(self, file: InputFile, asked: Sequence[Asked], row: int = 0, whole: bool = False) -> None:
        wrong = what_it_is_instead(head_of(file.path, file.compression), file.format)
        if wrong is not None:
            raise InputError(f"{file.shown} {wrong}")
        self._asked, self._row, self._whole = asked, row, whole
        self.line = 0
        if row == 0:
            _require_columns(file, asked, self._sampled(file))
        self._elements = _Elements(file)
        self.consumed = self._elements.stream.consumed
        self.close = self._elements.stream.close

    def __iter__(self) -> Iterator[Row]:
        for number, (text, line, problem) in enumerate(self._elements):
            if number < self._row:
                continue
            self.line = line
            record, problem = parse_object(text, problem, "element")
            yield row_of(record, problem, self._asked, line, self._whole)

    def _sampled(self, file: InputFile) -> _Sample:
        elements = _Elements(file)
        try:
            for text, _, problem in elements:
                yield parse_object(text, problem, "element")
        finally:
            elements.stream.close()


class _Elements:
    """The elements of a list as texts, each with the line it begins in and what is wrong with its bytes.

    Raises:
        EOFError: the list goes on in a way that is no JSON; the message has the line.
    """

    def __init__(self, file: InputFile) -> None:
        self.stream = ByteStream(file.path, file.compression)
        self._decode = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape").decode
        self._text, self._place, self._line, self._end = "", 0, 1, False
        self._damage: BaseException | None = None

    def __iter__(self) -> Iterator[tuple[str, int, str | None]]:
        self._expect("[", "a list")
        if self._peek() == "]":
            self._expect("]", "the list's end")
        else:
            while True:
                yield self._element()
                if self._peek() != ",":
                    break
                self._expect(",", "a comma")
            self._expect("]", "a comma or the list's end")
        if self._peek():
            raise EOFError(f"line {self._line}: something follows the list")

    def _element(self) -> tuple[str, int, str | None]:
        self._peek()
        line, scan = self._line, _Scan()
        while not scan.find_end(self._text, self._place):
            if len(self._text) - self._place > MAX_ROW_BYTES:
                raise EOFError(f"line {line}: the element is longer than {MAX_ROW_BYTES >> 20} MiB, or has no end")
            if not self._more():
                if scan.place:
                    break  # a whole value at the very end
                raise EOFError(f"line {line}: the element that begins there has no end")
        text, self._place = self._text[self._place : scan.place], scan.place
        self._line += text.count("\n")
        return text, line, _not_utf8(text, line)

    def _expect(self, letter: str, what: str) -> None:
        found = self._peek()
        if found != letter:
            raise EOFError(f"line {self._line}: {what} should stand there, not {found or 'the end of the file'!r}")
        self._place += 1

    def _peek(self) -> str:
        """The next letter that is no white space, an empty one at the end."""
        while True:
            while self._place < len(self._text) and self._text[self._place].isspace():
                self._line += self._text[self._place] == "\n"
                self._place += 1
            if self._place < len(self._text) or not self._more():
                return self._text[self._place : self._place + 1]

    def _more(self) -> bool:
        """Read on, as much again as there is, so that a long element is looked at few times."""
        if self._end:
            return False
        if self._damage is not None:
            raise self._damage
        piece = self._read(max(CHUNK_BYTES, len(self._text) - self._place))
        self._end = not piece
        self._text = self._text[self._place :] + self._decode(piece, self._end)
        self._place = 0
        return True

    def _read(self, count: int) -> bytes:
        """Bytes, up to where the file is damaged; no bytes at its end."""
        piece = b""
        try:
            while len(piece) < count and (more := self.stream.read1(count - len(piece))):
                piece += more
        except DAMAGE as error:
            if not piece:
                raise
            self._damage = error
        return piece


class _Scan:
    """Looks for the end of a JSON value: where brackets are closed, outside strings."""

    def __init__(self) -> None:
        self.place = 0

    def find_end(self, text: str, start: int) -> bool:
        """Whether the value that begins at ``start`` ends in the text; ``place`` is behind it."""
        self.place = 0
        try:
            _, self.place = _decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            return self._by_brackets(text, start)
        return self.place < len(text)  # a number may go on

    def _by_brackets(self, text: str, start: int) -> bool:
        depth, place, quoted = 0, start, False
        while place < len(text):
            letter = text[place]
            if quoted:
                if letter == "\\":
                    place += 1
                quoted = letter != '"'
            elif letter == '"':
                quoted = True
            elif letter in "[{":
                depth += 1
            elif letter in "]}" or (letter == "," and not depth):
                depth -= letter != ","
                if depth <= 0:
                    self.place = place + (depth == 0 and letter != ",")
                    return True
            place += 1
        return False


_decoder = json.JSONDecoder()


def parse_object(text: str, problem: str | None, what: str) -> tuple[Record, str | None]:
    """A JSON object, or what is wrong with it; ``what`` the text is: a line, an element."""
    if problem is not None:
        return {}, problem
    if not text.strip():
        return {}, f"the {what} is blank"
    try:
        record = json.loads(text.rstrip(), object_pairs_hook=object_of)
    except json.JSONDecodeError as error:
        return {}, f"the {what} is not JSON: {error.msg} at character {error.pos + 1}"
    except (ValueError, RecursionError) as error:  # an integer of 10,000 digits, a list nested as deep
        return {}, f"the {what} is not JSON that can be read: {error}"
    if not isinstance(record, dict):
        return {}, f"the {what} is a JSON {_json_kind(record)}, not an object with fields"
    return record, None


def row_of(record: Record, problem: str | None, asked: Sequence[Asked], line: int, whole: bool) -> Row:
    """The values asked for, or the whole record; a record without its text is a bad one."""
    if whole:
        return Row([record], problem or _twice(repeated_in(record)), line=line)
    if problem is not None:
        return Row([None] * len(asked), problem, line=line)
    values = []
    for name, _, _, text in asked:
        try:
            there, value = value_in(record, name)
            twice = repeated_in(value)
        except KeyError as error:
            there, value, twice = True, None, error.args[0]
        problem = problem or _twice(twice)
        if not there and text:
            problem = problem or f"the row has no field {name!r}, only {', '.join(map(repr, record)) or 'none'}"
        values.append(value)
    return Row(values, problem, line=line)


def _twice(name: str | None) -> str | None:
    return None if name is None else f"the row has two fields {name!r}"


def _require_columns(file: InputFile, asked: Sequence[Asked], rows: _Sample) -> None:
    """Refuse a file whose first rows all lack a column: many of them, as a field may be rare.

    Raises:
        InputError: it names the column, and the fields that there are.
    """
    needed, found, count = {each.name for each in asked if each.required}, {}, 0
    try:
        for record, problem in islice(rows, SAMPLED_ROWS):
            if problem is None:
                found |= dict.fromkeys(names_in(record, asked))
                count += 1
            if needed <= found.keys():
                return
    except DAMAGE as error:  # the rows before it are read, and what is damaged is told there
        if isinstance(error, OSError) and error.errno is not None:
            raise
    finally:
        rows.close()
    if count:
        require_columns(file.shown, asked, list(found))


def _not_utf8(text: str, line: int) -> str | None:
    if text.isascii():
        return None
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"byte 0x{ord(text[error.start]) - 0xDC00:02x} of the element in line {line} is not UTF-8"
    return None


def _json_kind(value: Any) -> str:
    kinds = {str: "string", bool: "boolean", int: "number", float: "number", list: "list", type(None): "null"}
    return kinds.get(type(value), type(value).__name__)
