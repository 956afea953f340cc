"""Labelled sentences from CoNLL columns, or from files with a list of words and a list of labels a row."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from llm2vec_fast.data.delimited import Csv
from llm2vec_fast.data.inputs import COMPRESSIONS, InputFile, describe
from llm2vec_fast.data.lines import Lines
from llm2vec_fast.data.parquet import open_parquet
from llm2vec_fast.data.reading import check_heads, rows_of
from llm2vec_fast.data.rows import Asked
from llm2vec_fast.errors import UserError

_COLUMNS = (".txt", ".conll", ".conllu", ".iob", ".bio")
_TABLES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet"}
_DOCUMENT = "-DOCSTART-"
_UNIVERSAL = ".conllu"  # columns parted by tabs; comments begin with #, and 3-4 or 3.1 number what is not a word


class Sentence(NamedTuple):
    """Words and their labels, one each."""

    words: list[str]
    labels: list[str]


def read_sentences(files: Sequence[str], word_column: str, label_column: str) -> list[Sentence]:
    """The sentences of some files, in order; those without a word are left out.

    Args:
        files: CoNLL columns (a word a line, columns parted by white space, a blank line between sentences, lines of
            -DOCSTART- skipped), CoNLL-U (its comments and all that is not a numbered word skipped), or jsonl or
            parquet with a list of words and one of labels a row.
        word_column, label_column: numbers of columns, from 0 or, negative, from the last; or their names in a table.

    Raises:
        UserError: a file is missing, damaged, of an unknown kind, without the column, or a row's lists differ in
            length.
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
            rows = _from_table(describe(file, kind=_TABLES[kind]), word_column, label_column)
        found += (sentence for sentence in rows if sentence.words)
    if not found:
        raise UserError(f"there is no labelled sentence in {', '.join(map(str, files))}: check the files")
    return found


def _from_columns(file: InputFile, kind: str, word_column: str, label_column: str) -> Iterator[Sentence]:
    columns = (word_column, "word"), (label_column, "label")
    word, label = (_number(column, name, file.shown) for column, name in columns)
    sentence, universal, width = Sentence([], []), kind == _UNIVERSAL, None
    lines = Lines(file)
    for line in lines:
        wrong = lines.forget()
        if wrong is not None:
            raise UserError(f"line {lines.number} of {file.shown}: {wrong}; save it as UTF-8")
        fields = line.rstrip("\r\n").split("\t") if universal and line.strip() else line.split()
        if universal and fields and not fields[0].isdigit():
            continue
        if not fields or fields[0] == _DOCUMENT:
            yield sentence
            sentence = Sentence([], [])
            continue
        width = width or len(fields)
        if len(fields) != width:
            raise UserError(
                f"line {lines.number} of {file.shown} has {len(fields)} columns where those before have {width}: give "
                "one word a line with its labels"
            )
        for column, index in (("word_column", word), ("label_column", label)):
            if not -len(fields) <= index < len(fields):
                raise UserError(
                    f"line {lines.number} of {file.shown} has {len(fields)} columns and no {column}={index}"
                )
        sentence.words.append(fields[word])
        sentence.labels.append(fields[label])
    yield sentence
    lines.close()


def _number(column: str, name: str, file: str) -> int:
    try:
        return int(column)
    except ValueError:
        raise UserError(f"{name}_column={column!r} is not a number, and {file} has no names: count from 0") from None


def _from_table(file: InputFile, word_column: str, label_column: str) -> Iterator[Sentence]:
    asked = [Asked(word_column, "word_column"), Asked(label_column, "label_column")]
    check_heads([file], asked, Csv())
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
        if any(each is None or isinstance(each, list | dict) for each in (*words, *labels)):
            raise UserError(f"{place} has a word or a label that is null or a list: give a text for each")
        if names and any(type(i) is not int or not 0 <= i < len(names) for i in labels):
            raise UserError(f"{place} has a label that is none of the {len(names)} of its column: leave the row out")
        yield Sentence([str(word) for word in words], [names[i] if names else str(i) for i in labels])


def _class_names(file: InputFile, label_column: str) -> list[str] | None:
    """What numbers of labels stand for, as the datasets library writes it into parquet files."""
    if file.format != "parquet":
        return None
    from datasets import ClassLabel, Features

    with open_parquet(file) as opened:
        kind = Features.from_arrow_schema(opened.schema_arrow).get(label_column)
    kind = getattr(kind, "feature", None)
    return kind.names if isinstance(kind, ClassLabel) else None
