"""Texts to ids, some at a time, ahead of the model that embeds them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

import numpy as np

from ..tokenization import TextTokenizer, TokenizedTexts, check_room

Item = TypeVar("Item")
Result = TypeVar("Result")
Pairs = Sequence[tuple[str, str]]  # instruction, text


def prepare(tokenizer: TextTokenizer, pairs: Pairs, first: int, *, offsets: bool, skip_prompt: bool) -> TokenizedTexts:
    """Tokens of (instruction, text) pairs, the first of which is number ``first`` of all.

    Raises:
        UserError: a prompt fills all of max_length.
    """
    tokens = tokenizer(pairs, with_offsets=offsets)
    check_room(tokens, pairs, first, tokenizer.max_length)
    return tokens if skip_prompt else replace(tokens, skip=np.zeros_like(tokens.skip))


def take_out_unknown(tokens: TokenizedTexts, vocabulary: int, name: Callable[[int], str]) -> dict[int, str]:
    """Empty the texts that hold a token without a row in the model's embedding; why, by their places.

    Args:
        vocabulary: rows of the embedding.
        name: of a token by its id.
    """
    counts = tokens.lengths
    flat = np.concatenate(tokens.ids) if len(counts) else np.empty(0, np.int64)
    reasons = {}
    for text in np.unique(np.repeat(np.arange(len(counts)), counts)[flat >= vocabulary]).tolist():
        token = int(tokens.ids[text].max())
        reasons[text] = (
            f"its token {name(token)!r} has the id {token}, beyond the {vocabulary} rows of the model's embedding: "
            "resize the embedding (resize_token_embeddings), or use the model's own tokenizer"
        )
        tokens.ids[text], tokens.skip[text] = tokens.ids[text][:0], 0
        if tokens.offsets:
            tokens.offsets[text] = tokens.offsets[text][:0]
    return reasons


def one_ahead(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Results in order; while the caller uses one, a thread makes the next, and no more than that."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenise") as executor:
        coming = None
        for item in items:
            ready, coming = coming, executor.submit(function, item)
            if ready is not None:
                yield ready.result()
        if coming is not None:
            yield coming.result()
