"""CSV and TSV with a header line. What is ambiguous is not guessed: it is a bad row, with its line."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

from llm2vec_fast.data.columns import require_columns, require_different
from llm2vec_fast.data.inputs import InputFile
from llm2vec_fast.data.lines import Lines
from llm2vec_fast.data.rows import MAX_ROW_BYTES, Asked, Row
from llm2vec_fast.errors import InputError

DELIMITERS = ",;\t|"
SAMPLED_ROWS = 100  # to see a delimiter at the end of every row
_NAMED = {"none": "", "tab": "\t", "\\t": "\t", "space": " ", "backslash": "\\"}
_SEPARATOR = "sep="  # a first line of Excel's


@dataclass(frozen=True)
class Csv:
    """How CSV and TSV files are written; None leaves a choice to the file.

    ``delimiter`` parts fields (default: a tab in .tsv, else the one of , ; tab | that fits the header), ``quote`` is
    around them (default: " in .csv, none in .tsv; "" for none), ``escape`` stands before a quote inside (default: none,
    such a quote is doubled). An escape before a letter that needs none is a letter itself.
    """

    delimiter: str | None = None
    quote: str | None = None
    escape: str | None = None

    def __post_init__(self) -> None:
        for name in ("delimiter", "quote", "escape"):
            value = getattr(self, name)
            value = _NAMED.get(value, value)
            object.__setattr__(self, name, value)
            if value is None or (not value and name != "delimiter"):
                continue
            if len(value) != 1 or value in "\r\n":
                raise InputError(f"csv {name} {value!r} is not one character: give one, or leave it out")

    def quote_of(self, file: InputFile) -> str:
        """The quote of a file, empty for none."""
        return ("" if file.format == "tsv" else '"') if self.quote is None else self.quote


class _Header(NamedTuple):
    """``names`` of the columns, ``width`` of a record (one more, if each ends in a delimiter), where records begin."""

    delimiter: str
    names: list[str]
    width: int
    offset: int
    line: int


class DelimitedReader:
    """A row is a record, the header is none, nor are blank lines. A quoted field may hold line breaks."""

    def __init__(
        self, file: InputFile, asked: Sequence[Asked], how: Csv, offset: int = 0, line: int = 0, whole: bool = False
    ) -> None:
        header = _read_header(file, asked, how)
        if whole:
            require_different(file.shown, header.names)
        self._names = header.names
        self.ends_in_delimiter = header.width > len(header.names)
        self._header, self._whole = header, whole
        places = {name: place for place, name in enumerate(header.names)}
        self._places = [places.get(each.name) for each in asked] if header.names else []
        self.offset, self.line = offset or header.offset, line if offset else header.line
        self._lines = Lines(file, self.offset, self.line)
        self._records = _Records(self._lines, header.delimiter, how.quote_of(file), how.escape or "")
        self.consumed = self._lines.consumed
        self.close = self._lines.close

    def __iter__(self) -> Iterator[Row]:
        for fields, problem, damaged, line in self._records:
            self.offset, self.line = self._lines.offset, self._lines.number
            problem = problem or self._lines.forget()
            if fields or problem:  # a blank line is no record
                yield self._row(fields, problem, damaged, line)
            if damaged:
                return

    def _row(self, fields: list[str], problem: str | None, damaged: bool, line: int) -> Row:
        width = self._header.width
        if problem is None and (len(fields) != width or (width > len(self._names) and fields[-1])):
            problem = f"the record has {len(fields)} fields, {_told_width(self._header)}"
        if problem is not None:
            return Row([{}] if self._whole else [None] * len(self._places), problem, 1, damaged, line)
        if self._whole:
            return Row([dict(zip(self._names, fields, strict=False))], line=line)
        return Row([None if place is None else fields[place] for place in self._places], line=line)


def _told_width(header: _Header) -> str:
    names = len(header.names)
    return f"the header has {names}" + (", and others end in a delimiter" if header.width > names else "")


class _Records:
    """Records of lines: fields, what is wrong, whether the rest is damaged, and the line where each begins."""

    def __init__(self, lines: Lines, delimiter: str, quote: str, escape: str) -> None:
        csv.field_size_limit(MAX_ROW_BYTES)
        self._lines, self._delimiter, self._quote, self._escape = lines, delimiter, quote, escape
        self._read: list[str] = []  # lines of the record at hand

    def __iter__(self) -> Iterator[tuple[list[str], str | None, bool, int]]:
        if not self._quote and not self._escape:
            for line in self._lines:
                content = line.rstrip("\r\n")
                yield content.split(self._delimiter) if content else [], None, False, self._lines.number
            return
        records = csv.reader(self._source(), strict=True, **_format(self._delimiter, self._quote, self._escape))
        while True:
            first, self._read = self._lines.number + 1, []
            try:
                yield next(records), None, False, first
            except StopIteration:
                return
            except csv.Error as error:
                yield [], *self._problem(error, first), first

    def _source(self) -> Iterator[str]:
        """The lines, with an escape doubled where it stands before a letter that needs none: csv would drop it."""
        escape, meant = self._escape, self._quote + self._delimiter + self._escape + "\r\n"
        escaped = re.compile(re.escape(escape) + "(.)", re.DOTALL)
        for line in self._lines:
            self._read.append(line)
            if escape and escape in line:
                line = escaped.sub(lambda found: found[0] if found[1] in meant else escape + found[0], line)
            yield line

    def _problem(self, error: csv.Error, first: int) -> tuple[str, bool]:
        """What is wrong, and whether the rest of the file cannot be read."""
        last = self._lines.number
        if "unexpected end of data" in str(error):
            opened = first + self._lines_before_quote()
            lost = f"line {first} is" if first == last else f"lines {first} to {last} are"
            return f"the quote that opens in line {opened} is never closed: {lost} not read", True
        if "field larger than field limit" in str(error):
            opened = first + self._lines_before_quote()
            reason = f"the quote that opens in line {opened} is not closed within {MAX_ROW_BYTES >> 20} MiB"
            return f"{reason}: the file is not read from line {first} on", True
        where = f"the record in line {first}" if first == last else f"the record in lines {first} to {last}"
        if "new-line character" in str(error):
            return f"{where} cannot be read: a carriage return stands in it outside quotes", False
        hint = "a quote inside quotes is doubled, or give --csv-escape or --csv-quote none"
        return f"{where} cannot be read: {error} ({hint})", False

    def _lines_before_quote(self) -> int:
        """Lines of the record at hand that end before the quote opens that is open at its end."""
        text, quoted, opened, place, fresh = "".join(self._read), False, 0, 0, True
        while place < len(text):
            letter = text[place]
            if letter == self._escape:
                place += 1
                fresh = False
            elif letter == self._quote and (quoted or fresh):
                quoted, opened, fresh = not quoted, place, True  # doubled, it opens again
            else:
                fresh = not quoted and letter in (self._delimiter, "\n")
            place += 1
        return text.count("\n", 0, opened)


def _format(delimiter: str, quote: str, escape: str) -> dict[str, Any]:
    quoting = {"quotechar": quote} if quote else {"quoting": csv.QUOTE_NONE}
    return {"delimiter": delimiter, "escapechar": escape or None, **quoting}


def _read_header(file: InputFile, asked: Sequence[Asked], how: Csv) -> _Header:
    """The names (none in an empty file), and where the first record starts.

    Raises:
        InputError: the header cannot be read, lacks a column, or has two of a name.
    """
    needed = {each.name for each in asked if each.required}
    headers, wrong = [], []
    for delimiter in _candidates(file, how):
        try:
            headers.append(_header_by(file, how, delimiter))
        except InputError as error:  # quotes do not end before other delimiters than the file's
            wrong.append(error)
    if not headers:
        raise wrong[0]
    fitting = [header for header in headers if needed <= set(header.names)]
    chosen = fitting[0] if fitting else max(headers, key=lambda header: len(header.names))
    bare = {name.strip('"') for name in chosen.names if len(name) > 1 and name[0] == name[-1] == '"'}
    if bare and not fitting and needed <= bare and not how.quote_of(file):
        raise InputError(f"{file.shown} has its columns' names in quotes: give --csv-quote '\"'")
    if chosen.names:
        require_columns(file.shown, asked, chosen.names)
    return chosen


def _candidates(file: InputFile, how: Csv) -> str:
    if how.delimiter is not None:
        return how.delimiter
    lines = Lines(file)
    try:
        first = next(lines, "").rstrip("\r\n")
    finally:
        lines.close()
    told = first[len(_SEPARATOR) :]
    if first.lower().startswith(_SEPARATOR) and len(told) == 1:
        return told
    return "\t" if file.format == "tsv" else DELIMITERS


def _header_by(file: InputFile, how: Csv, delimiter: str) -> _Header:
    lines = Lines(file)
    try:
        records = iter(_Records(lines, delimiter, how.quote_of(file), how.escape or ""))
        names = _names(records, file)
        if len(names) <= 2 and names[:1] and names[0].lower().startswith(_SEPARATOR):  # sep=, is two fields
            names = _names(records, file)
        offset, number = lines.offset, lines.number
        sampled = [fields for fields, *_ in islice(records, SAMPLED_ROWS) if fields]
    finally:
        lines.close()
    longer = (
        len(names) > 1 and bool(sampled) and all(len(fields) == len(names) + 1 and not fields[-1] for fields in sampled)
    )
    return _Header(delimiter, names, len(names) + longer, offset, number)


def _names(records: Iterator[tuple[list[str], str | None, bool, int]], file: InputFile) -> list[str]:
    for fields, problem, _, _ in records:
        if problem is not None:
            raise InputError(f"the header of {file.shown} cannot be read: {problem}")
        if fields:
            return [name.strip() for name in fields]
    return []


def keeps_quotes(file: InputFile, how: Csv) -> bool:
    """Whether a .tsv file, read without quoting, has fields in quotes among its first."""
    if file.format != "tsv" or how.quote is not None:
        return False
    lines = Lines(file)
    try:
        delimiter = how.delimiter or "\t"
        heads = [line.rstrip("\r\n").split(delimiter) for line in islice(lines, SAMPLED_ROWS)]
    finally:
        lines.close()
    return any(len(field) > 1 and field[0] == field[-1] == '"' for fields in heads for field in fields)
