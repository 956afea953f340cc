"""Texts to one packed batch, as `LLM2Vec.encode` sees them: template, instruction, limits, and what pooling skips."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from llm2vec_fast.tokenization import TextTokenizer, check_room


def pack(tokenizer: TextTokenizer, texts: Sequence[tuple[str, str]], views: int = 1) -> dict[str, Tensor]:
    """(instruction, text) pairs to one packed batch.

    Args:
        tokenizer: as the encoder's own.
        texts: an instruction of "" is none.
        views: how often the batch holds all texts, one time after the other.

    Returns:
        ``input_ids`` (1, T), ``lengths`` (views · N,) and ``skip`` (views · N,), leading tokens that pooling leaves
        out; int64.

    Raises:
        UserError: an instruction fills all of the tokens that a text may have.
    """
    tokens = tokenizer(texts)
    check_room(tokens, texts, 0, tokenizer.max_length)
    ids = torch.cat([torch.from_numpy(row) for row in tokens.ids])
    return {
        "input_ids": ids.repeat(views)[None],
        "lengths": torch.from_numpy(tokens.lengths).repeat(views),
        "skip": torch.from_numpy(tokens.skip).repeat(views),
    }


def identity(text: str) -> int:
    """A number that texts share only if they are equal but for white space; the same on every machine."""
    digest = hashlib.blake2b(" ".join(text.split()).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
