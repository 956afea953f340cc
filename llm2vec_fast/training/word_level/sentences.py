"""Labelled sentences from CoNLL columns, or from files with a list of words and a list of labels a row."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from llm2vec_fast.data.delimited import Csv
from llm2vec_fast.data.inputs import COMPRESSIONS, InputFile, describe
from llm2vec_fast.data.lines import Lines
from llm2vec_fast.data.parquet import open_parquet
from llm2vec_fast.data.reading import check_heads, rows_of
from llm2vec_fast.data.rows import Asked, text_of
from llm2vec_fast.errors import UserError

logger = logging.getLogger(__name__)

_COLUMNS = (".txt", ".conll", ".conllu", ".iob", ".bio", ".tsv")
_TABLES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet"}
_DOCUMENT = "-DOCSTART-"
_UNIVERSAL = ".conllu"  # comments begin with #, and 3-4 or 3.1 number what is not a word
_NO_WORD = re.compile(r"[0-9]+[-.][0-9]+")
_BLANKS = re.compile("[ \t]+")  # no other white space: a no-break space is a part of a word


class Sentence(NamedTuple):
    """Words and their labels, one each."""

    words: list[str]
    labels: list[str]


def read_sentences(
    files: Sequence[str],
    word_column: str,
    label_column: str,
    notify: Callable[[str], None] = logger.warning,
) -> list[Sentence]:
    """The sentences of some files, in order; those without a word are left out.

    Args:
        files: CoNLL columns (a word a line, a blank line between sentences, lines of -DOCSTART- skipped), CoNLL-U (its
            comments and all that is not a numbered word skipped), or jsonl or parquet with a list of words and one of
            labels a row. Columns are parted by tabs in .tsv, in .conllu and where the first word's line has one: a word
            may hold spaces there; else by spaces.
        word_column, label_column: numbers of columns, from 0 or, negative, from the last; or their names in a table.
        notify: takes sentences about what a user may not expect of a file.

    Raises:
        UserError: a file is missing, damaged, of an unknown kind, without the column, or has a row without one label a
            word.
    """
    found: list[Sentence] = []
    for file in map(Path, map(os.path.expanduser, files)):
        if not file.is_file():
            raise UserError(f"the labelled file {file} does not exist: check the path")
        kind = (file.with_suffix("") if file.suffix.lower() in COMPRESSIONS else file).suffix.lower()
        if kind not in (*_COLUMNS, *_TABLES):
            raise UserError(f"{file} ends in {kind!r}, which is not known: give {', '.join((*_COLUMNS, *_TABLES))}")
        if kind in _COLUMNS:
            rows = _from_columns(describe(file, kind="txt"), kind, word_column, label_column)
        else:
            rows = _from_table(describe(file, kind=_TABLES[kind]), word_column, label_column, notify)
        before = len(found)
        found += (sentence for sentence in rows if sentence.words)
        if len(found) == before:
            notify(f"{file} holds no labelled sentence")
    if not found:
        raise UserError(f"there is no labelled sentence in {', '.join(map(str, files))}: check the files")
    return found


def _from_columns(file: InputFile, kind: str, word_column: str, label_column: str) -> Iterator[Sentence]:
    columns = (word_column, "word"), (label_column, "label")
    word, label = (_number(column, name, file.shown) for column, name in columns)
    sentence, width = Sentence([], []), None
    for number, fields in _fields(file, kind):
        if not fields:
            yield sentence
            sentence = Sentence([], [])
            continue
        place, width = f"line {number} of {file.shown}", width or len(fields)
        if len(fields) != width:
            raise UserError(
                f"{place} has {len(fields)} columns where those before have {width}: give one word a line with its "
                "labels"
            )
        for column, index in (("word_column", word), ("label_column", label)):
            if not -len(fields) <= index < len(fields):
                raise UserError(f"{place} has {len(fields)} columns and no {column}={index}")
            if not fields[index]:
                raise UserError(f"{place} has nothing in {column}={index}: give each word its label")
        sentence.words.append(fields[word])
        sentence.labels.append(fields[label])
    yield sentence


def _fields(file: InputFile, kind: str) -> Iterator[tuple[int, list[str]]]:
    """Each line's number and fields, of which one that parts sentences has none."""
    universal, tabs = kind == _UNIVERSAL, True if kind in (_UNIVERSAL, ".tsv") else None
    lines = Lines(file)
    try:
        for line in lines:
            wrong, place = lines.forget(), f"line {lines.number} of {file.shown}"
            if wrong is not None:
                raise UserError(f"{place}: {wrong}; save it as UTF-8")
            line = line.strip("\r\n") if universal else line.strip(" \t\r\n")
            if not line.strip(" \t") or _BLANKS.split(line, maxsplit=1)[0] == _DOCUMENT:
                yield lines.number, []
                continue
            if universal and (line.startswith("#") or _NO_WORD.fullmatch(line.split("\t")[0])):
                continue
            tabs = "\t" in line if tabs is None else tabs
            fields = [field.strip(" ") for field in line.split("\t")] if tabs else _BLANKS.split(line)
            if universal and not fields[0].isdigit():
                raise UserError(f"{place} begins with {fields[0][:40]!r}, which numbers no word: part columns by tabs")
            yield lines.number, fields
    finally:
        lines.close()


def _number(column: str, name: str, file: str) -> int:
    try:
        return int(column)
    except ValueError:
        raise UserError(f"{name}_column={column!r} is not a number, and {file} has no names: count from 0") from None


def _from_table(
    file: InputFile, word_column: str, label_column: str, notify: Callable[[str], None]
) -> Iterator[Sentence]:
    asked = [Asked(word_column, "word_column"), Asked(label_column, "label_column")]
    for sentence in check_heads([file], asked, Csv()):
        notify(sentence)
    names = _class_names(file, label_column)
    number = 0
    for row in rows_of(file, asked, Csv()):
        number += row.rows
        place = f"row {number} of {file.shown}" if row.line is None else f"line {row.line} of {file.shown}"
        if row.problem is not None:
            raise UserError(f"{place}: {row.problem}")
        words, labels = (value[0].as_py() if isinstance(value, pa.Array) else value for value in row.values)
        if not isinstance(words, list) or not isinstance(labels, list) or len(words) != len(labels):
            raise UserError(f"{place} has not one label a word: give two lists of one length")
        if names and any(type(i) is not int or not 0 <= i < len(names) for i in labels):
            raise UserError(f"{place} has a label that is none of the {len(names)} of its column: leave the row out")
        labels = [names[i] if names else str(i) if type(i) is int else i for i in labels]  # numbers of classes
        yield Sentence([_text(word, "word", place) for word in words], [_text(x, "label", place) for x in labels])


def _text(value: Any, what: str, place: str) -> str:
    """A word or a label as the text that it is; a word may be white space, which has no token."""
    if what == "word" and isinstance(value, str) and not value.strip():
        return value
    text, wrong = text_of(value, what)
    if wrong is not None:
        raise UserError(f"{place}: {wrong}; give a text for each word and each label")
    return text


def _class_names(file: InputFile, label_column: str) -> list[str] | None:
    """What numbers of labels stand for, as the datasets library writes it into parquet files."""
    if file.format != "parquet":
        return None
    from datasets import ClassLabel, Features

    with open_parquet(file) as opened:
        kind = Features.from_arrow_schema(opened.schema_arrow).get(label_column)
    kind = getattr(kind, "feature", None)
    return kind.names if isinstance(kind, ClassLabel) else None
