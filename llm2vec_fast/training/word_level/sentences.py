"""Labelled sentences from CoNLL columns, or from files with a list of words and a list of labels a row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from llm2vec_fast.errors import UserError
from llm2vec_fast.training.texts import read_rows

_COLUMNS = (".txt", ".conll", ".conllu", ".iob", ".bio")
_TABLES = (".jsonl", ".json", ".parquet")
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
    for file in map(Path, files):
        if not file.is_file():
            raise UserError(f"the labelled file {file} does not exist: check the path")
        kind = file.suffix.lower()
        if kind not in (*_COLUMNS, *_TABLES):
            raise UserError(f"{file} ends in {kind!r}, which is not known: give {', '.join((*_COLUMNS, *_TABLES))}")
        rows = _from_columns if kind in _COLUMNS else _from_table
        try:
            found += (sentence for sentence in rows(file, word_column, label_column) if sentence.words)
        except UnicodeDecodeError as error:
            raise UserError(f"{file} is not UTF-8: save it as UTF-8") from error
    if not found:
        raise UserError(f"there is no labelled sentence in {', '.join(map(str, files))}: check the files")
    return found


def _from_columns(file: Path, word_column: str, label_column: str) -> Iterator[Sentence]:
    word, label = (_number(column, name, file) for column, name in ((word_column, "word"), (label_column, "label")))
    sentence, universal, columns = Sentence([], []), file.suffix.lower() == _UNIVERSAL, None
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            fields = line.rstrip("\n").split("\t") if universal and line.strip() else line.split()
            if universal and fields and not fields[0].isdigit():
                continue
            if not fields or fields[0] == _DOCUMENT:
                yield sentence
                sentence = Sentence([], [])
                continue
            columns = columns or len(fields)
            if len(fields) != columns:
                raise UserError(
                    f"line {number} of {file} has {len(fields)} columns where those before have {columns}: give one "
                    "word a line with its labels"
                )
            for column, index in (("word_column", word), ("label_column", label)):
                if not -len(fields) <= index < len(fields):
                    raise UserError(f"line {number} of {file} has {len(fields)} columns and no {column}={index}")
            sentence.words.append(fields[word])
            sentence.labels.append(fields[label])
    yield sentence


def _number(column: str, name: str, file: Path) -> int:
    try:
        return int(column)
    except ValueError:
        raise UserError(f"{name}_column={column!r} is not a number, and {file} has no names: count from 0") from None


def _from_table(file: Path, word_column: str, label_column: str) -> Iterator[Sentence]:
    from datasets import ClassLabel

    rows = read_rows([str(file)])
    for column in (word_column, label_column):
        if column not in rows.column_names:
            raise UserError(f"{file} has no column {column!r}: there are {', '.join(rows.column_names)}")
    kind = getattr(rows.features[label_column], "feature", None)
    names = kind.names if isinstance(kind, ClassLabel) else None
    for number, row in enumerate(rows):
        words, labels = row[word_column], row[label_column]
        if not isinstance(words, list) or not isinstance(labels, list) or len(words) != len(labels):
            raise UserError(f"row {number} of {file} has not one label a word: give two lists of one length")
        yield Sentence([str(word) for word in words], [names[i] if names else str(i) for i in labels])
