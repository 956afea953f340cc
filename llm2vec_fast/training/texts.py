"""Training texts: from files to token sequences, kept on disk and mapped into memory by the datasets library."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from transformers import PreTrainedTokenizerBase

from llm2vec_fast.errors import UserError

_READERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_OPTIONS = {"csv": {"keep_default_na": False, "na_values": [""]}}  # NA and null are words that a text may be
_TEXT_COLUMN = "text"  # what the reader of plain text calls it
SHORTEST = 2  # tokens: the first is predicted by none


def read_texts(files: Sequence[str], text_column: str) -> Dataset:
    """One column ``text`` of non-empty strings, a row a text.

    Raises:
        UserError: see `read_rows`; or the column is missing, or no row has a text in it.
    """
    texts = read_rows(files)
    column = _TEXT_COLUMN if Path(files[0]).suffix.lower() == ".txt" else text_column
    if column not in texts.column_names:
        raise UserError(f"{_named(files)} has no column {column!r}: there are {', '.join(texts.column_names)}")
    texts = texts.select_columns([column]).rename_column(column, "text") if column != "text" else texts
    texts = texts.select_columns(["text"]).filter(
        lambda batch: [isinstance(text, str) and bool(text.strip()) for text in batch["text"]],
        batched=True,
        desc="texts",
    )
    if not len(texts):
        raise UserError(f"{_named(files)} has no text in column {column!r}: check the file")
    return texts


def read_rows(files: Sequence[str]) -> Dataset:
    """All columns of some files of one format.

    Raises:
        UserError: a file is missing, of an unknown format, or not readable.
    """
    kinds = {Path(name).suffix.lower() for name in files}
    unknown = sorted(kinds - set(_READERS))
    if unknown:
        raise UserError(f"files ending in {unknown[0] or 'nothing'!r} are not known: give {', '.join(_READERS)} files")
    readers = sorted({_READERS[kind] for kind in kinds})
    if len(readers) > 1:
        raise UserError(f"{_named(files)} are of several formats ({', '.join(readers)}): give files of one")
    for name in files:
        if not Path(name).is_file():
            raise UserError(f"{name} does not exist: check the path")
    try:
        rows = load_dataset(readers[0], data_files=list(files), split="train", **_OPTIONS.get(readers[0], {}))
        if readers[0] == "json":  # whose reader takes any bytes for text
            rows.data.validate(full=True)
    except Exception as error:  # the readers of damaged files raise anything
        raise _unreadable(files, error) from error
    return rows


def _unreadable(files: Sequence[str], error: Exception) -> UserError:
    """The sentence for files that a reader failed on."""
    empty = [name for name in files if not Path(name).stat().st_size]
    if empty:
        return UserError(f"{empty[0]} is empty: give a file with texts, or leave it out")
    cause = error.__cause__ or error  # datasets says no more than that it failed
    if isinstance(cause, UnicodeDecodeError) or "UTF8" in str(cause):
        return UserError(f"{_named(files)} is not UTF-8: save it as UTF-8")
    return UserError(f"{_named(files)} cannot be read: {' '.join(str(cause).split())[:300] or type(cause).__name__}")


def _named(files: Sequence[str]) -> str:
    """The files, of many the first few."""
    return ", ".join(files[:5]) + (f" and {len(files) - 5} more" if len(files) > 5 else "")


class Numbered(torch.utils.data.Dataset):
    """Rows of a dataset, each with its number under ``row``."""

    def __init__(self, rows: Dataset) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self._rows[index], "row": index}


def tokenise(texts: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, *, line_by_line: bool) -> Dataset:
    """Sequences of at most ``max_length`` tokens in columns ``input_ids`` and ``special`` (1 on the tokenizer's own).

    Args:
        line_by_line: each text is a sequence, cut at ``max_length``; else 1,000 at a time are joined, in order, and cut
            into sequences of exactly that length, and what is left of them at the end is dropped.

    Raises:
        UserError: no text is long enough.
    """
    tokenizer = copy.deepcopy(tokenizer)  # a call leaves its truncation behind, which would be saved with the model

    def encode(batch: dict[str, list[str]]) -> dict[str, list[Any]]:
        limits = {"truncation": True, "max_length": max_length} if line_by_line else {}
        found = tokenizer(batch["text"], return_special_tokens_mask=True, return_attention_mask=False, **limits)
        return {"input_ids": found["input_ids"], "special": found["special_tokens_mask"]}

    def join(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined = {name: list(chain.from_iterable(rows)) for name, rows in batch.items()}
        whole = len(joined["input_ids"]) // max_length * max_length
        cuts = range(0, whole, max_length)
        return {name: [values[i : i + max_length] for i in cuts] for name, values in joined.items()}

    # The tokenizer takes part in the name under which datasets keeps the result: no other model will find it.
    tokens = texts.map(encode, batched=True, remove_columns=["text"], desc="tokenising")
    if line_by_line:
        tokens = tokens.filter(lambda batch: [len(ids) >= SHORTEST for ids in batch["input_ids"]], batched=True)
    else:
        tokens = tokens.map(join, batched=True, desc="joining")
    if not len(tokens):
        least = SHORTEST if line_by_line else max_length
        raise UserError(f"no training text is long enough: {least} tokens are needed, give more or longer texts")
    return tokens
