"""Tokens that a tokenizer has and the model has not: found before training, not at a random step of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import islice

from torch import nn
from transformers import PreTrainedTokenizerBase

from llm2vec_fast.errors import UserError
from llm2vec_fast.tokenization import TextTokenizer

_AT_ONCE = 1024  # texts
_SHOWN = 60  # characters of a text


def embedding_rows(model: nn.Module) -> int:
    """Rows of the model's embedding of tokens."""
    return model.get_input_embeddings().weight.shape[0]


def has_tokens_beyond(tokenizer: PreTrainedTokenizerBase, rows: int) -> bool:
    """Whether a text can hold a token without a row; which texts do is worth a look then alone."""
    return max(tokenizer.get_vocab().values(), default=0) >= rows


def require_rows(
    texts: Sequence[str], ids: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase, rows: int
) -> None:
    """Refuse texts with tokens that the model has no embedding for.

    Args:
        texts: some texts.
        ids: their tokens.
        rows: of the model's embedding.

    Raises:
        UserError: it names the first such text, and the token.
    """
    for text, row in zip(texts, ids, strict=True):
        largest = max(row, default=0)
        if largest >= rows:
            raise UserError(
                f"the text {text[:_SHOWN]!r} holds the token {tokenizer.convert_ids_to_tokens(int(largest))!r} with "
                f"the id {largest}, beyond the {rows:,} rows of the model's embedding: resize the embedding "
                "(resize_token_embeddings), give the model's own tokenizer, or leave the text out"
            )


def require_rows_for(
    texts: Iterable[tuple[str, str]],
    text_tokenizer: TextTokenizer,
    tokenizer: PreTrainedTokenizerBase,
    model: nn.Module,
) -> None:
    """`require_rows` of (instruction, text) pairs, which are only tokenised where there may be something to find."""
    rows, left = embedding_rows(model), iter(texts)
    if not has_tokens_beyond(tokenizer, rows):
        return
    some, sought = list(islice(left, _AT_ONCE)), _sought(tokenizer, rows)
    if sought is not None:  # beyond the first texts, which show what the tokenizer adds to each
        join = text_tokenizer.template.join
        left = (pair for pair in left if sought.search(join(*pair).joined))
    while some:
        require_rows([" ".join(filter(None, pair)) for pair in some], text_tokenizer(some).ids, tokenizer, rows)
        some = list(islice(left, _AT_ONCE))


def _sought(tokenizer: PreTrainedTokenizerBase, rows: int) -> re.Pattern[str] | None:
    """What a text with a token without a row contains; None where only its tokens tell."""
    added = tokenizer.added_tokens_decoder
    beyond = [added.get(number) for number in tokenizer.get_vocab().values() if number >= rows]
    if any(token is None or token.normalized or re.search(r"\s", token.content) for token in beyond):
        return None
    return re.compile("|".join(re.escape(token.content) for token in beyond))
