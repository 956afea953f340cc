"""Rows of files of any format: a few at a time, from any row on, or all of them. None holds a whole file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pyarrow as pa

from llm2vec_fast.data.delimited import Csv, DelimitedReader, keeps_quotes
from llm2vec_fast.data.inputs import InputFile
from llm2vec_fast.data.jsonl import json_reader
from llm2vec_fast.data.parquet import ParquetReader
from llm2vec_fast.data.rows import Asked, Problem, Row, RowReader, text_of
from llm2vec_fast.data.sniffing import has_mac_line_ends, head_of
from llm2vec_fast.data.streams import DAMAGE
from llm2vec_fast.data.text import TextReader
from llm2vec_fast.data.values import JsonKinds, id_problem, is_id, unified
from llm2vec_fast.errors import InputError

JSON = ("jsonl", "json")
TOLD_BYTES = 100 << 20  # of JSON to read for types: a wait worth a word
CHECK_EVERY = 1024  # rows between two looks at the stop flag


def open_reader(
    file: InputFile,
    asked: Sequence[Asked],
    how: Csv,
    row: int = 0,
    offset: int = 0,
    line: int = 0,
    *,
    whole: bool = False,
) -> RowReader:
    """A reader that goes on after ``row`` rows, where ``offset`` and ``line`` are those that a reader had there.

    Args:
        asked: the columns.
        how: of csv and tsv files.
        whole: a row has one value, a record of all its columns by name; not of parquet files, see `read_tables`.

    Raises:
        InputError: a column is missing (the message names those there are) or there twice, or the file is not of its
            format.
    """
    if file.format == "parquet":
        return ParquetReader(file, asked, row)
    if file.format in JSON:
        return json_reader(file, asked, row, offset, line, whole)
    if file.format == "txt":
        return TextReader(file, asked, offset, line, whole)
    return DelimitedReader(file, asked, how, offset, line, whole)


def rows_of(file: InputFile, asked: Sequence[Asked], how: Csv, *, whole: bool = False) -> Iterator[Row]:
    """All rows of a file; the damaged rest of one comes as one bad row, which is damaged.

    Raises:
        InputError: see `open_reader`; or the disk does not give the file.
    """
    if file.bytes == 0:
        return
    count = 0
    try:
        reader = open_reader(file, asked, how, whole=whole)
        try:
            for row in reader:
                count += row.rows
                yield row
        finally:
            reader.close()
    except DAMAGE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise InputError(f"input {file.shown} cannot be read: {error.strerror}") from error
        yield damaged_from(count + 1, error, len(asked))


def texts_of(file: InputFile, asked: Asked, how: Csv) -> Iterator[str | Problem]:
    """All texts of a file, and in their places what is wrong with rows that have none.

    Raises:
        InputError: see `rows_of`; or the file is damaged.
    """
    number = 1
    for row in rows_of(file, [asked], how):
        if row.damaged:
            raise InputError(f"{file.shown}: {row.problem}")
        text, wrong = text_of(row.values[0]) if row.problem is None else ("", row.problem)
        yield text if wrong is None else Problem(file.name, number, None, wrong, row.rows, line=row.line)
        number += row.rows


def damaged_from(row: int, error: BaseException, columns: int) -> Row:
    """The row that stands for a rest which cannot be read."""
    reason = f"from row {row} on the file cannot be read: {error or 'it ends too early'}"
    return Row([None] * columns, reason, rows=0, damaged=True)


def check_heads(files: Sequence[InputFile], asked: Sequence[Asked], how: Csv, verb: str = "read") -> list[str]:
    """Look at the head of every file before the work begins. Returns sentences about what a user may not expect.

    Raises:
        InputError: a file lacks a column, is not of its format, or every file is empty.
    """
    empty = [file for file in files if file.bytes == 0]
    if len(empty) == len(files):
        names = files[0].shown if len(files) == 1 else f"all {len(files)} input files"
        raise InputError(f"nothing to {verb}: {names} {'is' if len(files) == 1 else 'are'} empty (0 bytes)")
    told = [f"{file.shown} is empty (0 bytes): skipped" for file in empty]
    for file in files:
        if file.bytes:
            told += _check_head(file, asked, how)
    return told


def _check_head(file: InputFile, asked: Sequence[Asked], how: Csv) -> list[str]:
    told = []
    try:
        reader = open_reader(file, asked, how)
        reader.close()
        if isinstance(reader, DelimitedReader) and reader.ends_in_delimiter:
            told.append(f"{file.shown} has a delimiter at the end of its rows that the header has not: it is left out")
        if file.format != "parquet" and has_mac_line_ends(head_of(file.path, file.compression)):
            told.append(f"{file.shown} has no line feeds: carriage returns are taken for the ends of its lines")
        if keeps_quotes(file, how):
            told.append(f"{file.shown} has fields in quotes, which stay in the text: --csv-quote '\"' reads them away")
    except DAMAGE as error:
        raise InputError(f"{file.shown} cannot be read: {error or 'it ends too early'}") from error
    return told


def decide_types(
    files: Sequence[InputFile],
    id_column: Asked | None,
    kept: Sequence[Asked],
    how: Csv,
    check: Callable[[], None] = lambda: None,
    notify: Callable[[str], None] = lambda sentence: None,
) -> dict[str, pa.DataType]:
    """The types in which an id and kept columns of some files can be written with no value changed.

    A column of Parquet files has its type there, one of csv, tsv and txt files is of strings. What a column of JSON is,
    all of its rows tell, which are read for it once; see `JsonKinds`.

    Args:
        check: called now and then while rows are read; what it raises ends it.

    Raises:
        InputError: the files' types of a column have none in common, or those of the id are no ids.
    """
    asked = [*([] if id_column is None else [id_column]), *kept]
    if not asked:
        return {}
    types: dict[str, list[tuple[str, pa.DataType]]] = {each.name: [] for each in asked}
    for file in files:
        if file.bytes and file.format not in JSON:
            for name, kind in _declared(file, asked).items():
                if id_column is not None and name == id_column.name and not is_id(kind):
                    raise InputError(
                        f"column {name!r} of {file.shown} holds {kind}, not ids: choose another with {id_column.option}"
                    )
                types[name].append((file.shown, kind))
    read = [each for each in asked if not each.text]  # a text that is none is a row left out
    of_json = _kinds_of([file for file in files if file.format in JSON], read, id_column, how, check, notify)
    for each in asked:
        of_json.setdefault(each.name, pa.string() if any(file.format in JSON for file in files) else None)
    return {name: unified(name, found, of_json[name]) for name, found in types.items()}


def _declared(file: InputFile, asked: Sequence[Asked]) -> dict[str, pa.DataType]:
    if file.format != "parquet":
        return {each.name: pa.string() for each in asked}
    reader = ParquetReader(file, [each._replace(text=False) for each in asked])
    try:
        return reader.types()
    finally:
        reader.close()


def _kinds_of(
    files: Sequence[InputFile],
    asked: Sequence[Asked],
    id_column: Asked | None,
    how: Csv,
    check: Callable[[], None],
    notify: Callable[[str], None],
) -> dict[str, pa.DataType | None]:
    if not files or not asked:
        return {}
    kinds = {each.name: JsonKinds() for each in asked}
    if sum(file.bytes for file in files) > TOLD_BYTES:
        notify(f"reading {len(files):,} JSON files once, for the types of {', '.join(map(repr, kinds))}")
    for file in files:
        for number, row in enumerate(rows_of(file, asked, how)):
            if number % CHECK_EVERY == 0:
                check()
            for each, value, kind in zip(asked, row.values, kinds.values(), strict=True):
                if each is not id_column or id_problem(value, each.name) is None:  # what is no id is a row left out
                    kind.add(value)
    return {name: kind.type for name, kind in kinds.items()}
