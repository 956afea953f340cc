"""Training texts: from files to token sequences, kept on disk and mapped into memory by the datasets library."""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import torch
from datasets import Dataset, Features, Value
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedTokenizerBase, TrainingArguments

from llm2vec_fast import data
from llm2vec_fast.data.delimited import Csv
from llm2vec_fast.data.inputs import InputFile, find_inputs
from llm2vec_fast.data.reading import check_heads, rows_of
from llm2vec_fast.data.rows import Asked, LeftOut, Problem, Row, text_of
from llm2vec_fast.errors import InputError, UserError
from llm2vec_fast.jobs.files import json_bytes, replacing
from llm2vec_fast.training.arguments import MntpArguments, SimcseArguments
from llm2vec_fast.training.sampling import NO_ROW
from llm2vec_fast.training.vocabulary import has_tokens_beyond, require_rows

logger = logging.getLogger(__name__)

SHORTEST = 2  # tokens: the first is predicted by none
LISTED = 100_000  # rows left out that a file lists
TOLD_SHARE = 0.01  # of tokens left over where texts are joined: some always are
_AT_ONCE = 1000  # texts
PLACE = {"problem": Value("string"), "file": Value("string"), "row": Value("int64"), "line": Value("int64")}


def read_texts(
    entries: Sequence[str],
    text_column: str,
    csv: Csv = Csv(),  # noqa: B008 - it is frozen
    listing: Path | None = None,
    notify: Callable[[str], None] = logger.warning,
    exclude: Sequence[Path] = (),
) -> Dataset:
    """One column ``text`` of texts, a row a text.

    Args:
        entries: files, folders and globs; see `find_inputs`.
        text_column: where the text is; a plain text file has one a line.
        csv: how csv and tsv files are written.
        listing: gets a line for each row that is left out, the first of them at least.
        notify: takes sentences about what is left out or passed over.
        exclude: folders of which nothing is taken from a folder or a glob.

    Raises:
        UserError: a file is missing, of an unknown format, damaged or without the column, or no row has a text.
    """
    files = find_inputs(entries, exclude, notify)
    asked = Asked(text_column, "text_column", text=True)
    for sentence in check_heads(files, [asked], csv):
        notify(sentence)
    features = Features({"text": Value("string"), **PLACE})
    texts = cached(_texts, features, files=tuple(files), asked=asked, csv=csv)
    first = tell_left_out(texts, listing, notify)
    texts = whole_rows(texts)
    if not len(texts):
        why = f" (the first, {first.place}: {first.reason})" if first else ""
        raise UserError(f"{named(files)} has no text in column {text_column!r}: check the file{why}")
    return texts.select_columns(["text"])


def notifier(arguments: TrainingArguments) -> Callable[[str], None]:
    """Takes sentences for the log; one process of several speaks."""
    return logger.warning if arguments.process_index == 0 else lambda sentence: None


def read_texts_of(arguments: MntpArguments | SimcseArguments, files: Sequence[str], *, validation: bool) -> Dataset:
    """`read_texts` of a stage's training or validation files."""
    listing = None if arguments.process_index else arguments.listing(validation=validation)
    exclude = [Path(arguments.output_dir)]
    return read_texts(files, arguments.text_column, arguments.csv, listing, notifier(arguments), exclude)


def cached(generate: Callable[..., Iterator[dict[str, Any]]], features: Features, **arguments: Any) -> Dataset:
    """What a function of this package yields, kept on disk: made once for the same arguments, of which the files have
    their sizes and times of change, and for the same readers.

    Raises:
        UserError: that of the function.
    """
    places = [*sorted(Path(str(data.__file__)).parent.glob("*.py")), Path(generate.__code__.co_filename)]
    code = hashlib.sha256(b"".join(place.read_bytes() for place in places)).hexdigest()
    try:
        return Dataset.from_generator(generate, features=features, gen_kwargs={**arguments, "code": code})
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise
    except ValueError as error:
        if "no data" not in str(error):  # what the library says of no rows
            raise
        return Dataset.from_dict({name: [] for name in features}, features=features)


def places_of(file: InputFile, rows: Iterator[Row]) -> Iterator[tuple[Row, dict[str, Any]]]:
    """Rows of a file with what `PLACE` names.

    Raises:
        InputError: the file is damaged: training on a part of it would go unnoticed.
    """
    number = 1
    for row in rows:
        if row.damaged:
            raise InputError(f"{file.shown}: {row.problem}")
        yield row, {"problem": row.problem, "file": file.name, "row": number, "line": row.line}
        number += row.rows


def whole_rows(rows: Dataset) -> Dataset:
    """Those that nothing is wrong with."""
    if rows.data.column("problem").null_count == len(rows):
        return rows
    return rows.filter(lambda problems: [x is None for x in problems], input_columns=["problem"], batched=True)


def tell_left_out(rows: Dataset, listing: Path | None, notify: Callable[[str], None]) -> Problem | None:
    """Say which rows are left out, and list them. Returns the first."""
    places = pc.indices_nonzero(pc.is_valid(rows.data.column("problem"))).to_pylist()
    if listing is not None:
        listing.unlink(missing_ok=True)  # of an earlier run
    if not places:
        return None
    known = rows.select_columns(list(PLACE)).select(places[:LISTED])
    problems = [Problem(row["file"], row["row"], None, row["problem"], line=row["line"]) for row in known]
    left = LeftOut(len(rows))
    left.add(problems)
    left.count = len(places)
    if listing is not None:
        listing.parent.mkdir(parents=True, exist_ok=True)
        with replacing(listing) as file:
            file.writelines(json_bytes(problem.as_json()) + b"\n" for problem in problems)
    what = "them all" if len(places) <= LISTED else f"the first {LISTED:,}"
    notify(left.sentence(None if listing is None else str(listing), what))
    return problems[0]


def named(files: Sequence[InputFile]) -> str:
    """The files, of many the first few."""
    return ", ".join(file.shown for file in files[:5]) + (f" and {len(files) - 5} more" if len(files) > 5 else "")


def _texts(files: Sequence[InputFile], asked: Asked, csv: Csv, code: str) -> Iterator[dict[str, Any]]:
    for file in files:
        for row, place in places_of(file, rows_of(file, [asked], csv)):
            text, wrong = text_of(row.values[0])
            yield {"text": text, **place, "problem": place["problem"] or wrong}


def _largest(tokens: Dataset) -> int:
    ids = (pc.max(pc.list_flatten(chunk)).as_py() for chunk in tokens.data.column("input_ids").chunks)
    return max((largest for largest in ids if largest is not None), default=0)


class Numbered(torch.utils.data.Dataset):
    """Rows of a dataset, each with its number under ``row``; None for `NO_ROW`."""

    def __init__(self, rows: Dataset) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def texts(self) -> Iterator[tuple[str, str]]:
        """All texts, each with an instruction, of which there is none."""
        return (("", text) for batch in self._rows.iter(_AT_ONCE) for text in batch["text"])

    def __getitem__(self, index: int) -> dict[str, Any] | None:
        return None if index == NO_ROW else {**self._rows[index], "row": index}


def tokenise(
    texts: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    line_by_line: bool,
    rows: int | None = None,
    name: str = "train_file",
    notify: Callable[[str], None] = logger.warning,
) -> Dataset:
    """Sequences of at most ``max_length`` tokens in columns ``input_ids`` and ``special`` (1 on the tokenizer's own).

    Args:
        line_by_line: each text is a sequence, cut at ``max_length``; else 1,000 at a time are joined, in order, and cut
            into sequences of exactly that length, and what is left of them at the end is dropped.
        rows: of the model's embedding.
        name: of the setting that the texts come from, for messages.
        notify: takes a sentence about what is too short.

    Raises:
        UserError: no text is long enough, or one holds a token without a row.
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
    if rows is not None and has_tokens_beyond(tokenizer, rows) and _largest(tokens) >= rows:
        for start in range(0, len(texts), _AT_ONCE):
            some = slice(start, start + _AT_ONCE)
            require_rows(texts[some]["text"], tokens[some]["input_ids"], tokenizer, rows)
    before = tokens
    if line_by_line:
        tokens = tokens.filter(lambda batch: [len(ids) >= SHORTEST for ids in batch["input_ids"]], batched=True)
        if len(tokens) < len(before):
            short = f"{len(before) - len(tokens):,} of {len(before):,}"
            notify(f"{short} texts of {name} are left out: they have one token or none")
    else:
        tokens = tokens.map(join, batched=True, desc="joining")
        total, kept = (pc.sum(pc.list_value_length(x.data.column("input_ids"))).as_py() or 0 for x in (before, tokens))
        if total - kept > TOLD_SHARE * total:
            notify(
                f"{total - kept:,} of {total:,} tokens of {name} are left out: the last of each 1,000 texts, which do "
                f"not fill {max_length}; line_by_line=True or a smaller max_seq_length keeps more"
            )
    if not len(tokens):
        least = SHORTEST if line_by_line else max_length
        raise UserError(f"no text of {name} is long enough: {least} tokens are needed, give more or longer texts")
    return tokens
