"""Texts to one packed batch, as `LLM2Vec.encode` sees them: template, instruction, limits, and what pooling skips."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from llm2vec_fast.kernels.layout import SequenceLayout
from llm2vec_fast.tokenization import TextTokenizer, check_room
from llm2vec_fast.training.masking import IGNORED

_MULTIPLE = 64


def pack(tokenizer: TextTokenizer, texts: Sequence[tuple[str, str]], views: int = 1) -> dict[str, Tensor]:
    """(instruction, text) pairs to one packed batch.

    Args:
        tokenizer: as the encoder's own.
        texts: an instruction of "" is none. Of no texts the batch holds one token, which counts nothing: where several
            processes train, each runs the model in every step.
        views: how often the batch holds all texts, one time after the other.

    Returns:
        ``input_ids`` (1, T), ``lengths`` (views · N,) and ``skip`` (views · N,), leading tokens that pooling leaves
        out; int64.

    Raises:
        UserError: an instruction fills all of the tokens that a text may have.
    """
    if not texts:
        return {"input_ids": torch.tensor([[0]]), "lengths": torch.tensor([1]), "skip": torch.tensor([0])}
    tokens = tokenizer(texts)
    check_room(tokens, texts, 0, tokenizer.max_length)
    ids = torch.cat([torch.from_numpy(row) for row in tokens.ids])
    return {
        "input_ids": ids.repeat(views)[None],
        "lengths": torch.from_numpy(tokens.lengths).repeat(views),
        "skip": torch.from_numpy(tokens.skip).repeat(views),
    }


def filled(batch: dict[str, Any]) -> dict[str, Any]:
    """A packed batch on a CPU, ended by a sequence of no text that makes its tokens a multiple of 64; others as given.

    On a CPU oneDNN keeps machine code, about half a megabyte, for every shape of product that it meets, and freed
    tensors leave gaps that only tensors of their size fill: batches of few sizes train in less memory.

    Args:
        batch: a model's input: ``input_ids`` and ``position_ids`` (1, T), perhaps ``labels`` (1, T) and ``layout``.
    """
    ids = batch["input_ids"]
    spare = -ids.shape[1] % _MULTIPLE
    if not (spare and ids.is_cpu):
        return batch
    batch = {**batch, "input_ids": F.pad(ids, (0, spare))}
    batch["position_ids"] = torch.cat([batch["position_ids"], torch.arange(spare)[None]], dim=1)
    if "labels" in batch:
        batch["labels"] = F.pad(batch["labels"], (0, spare), value=IGNORED)
    if "layout" in batch:
        batch["layout"] = SequenceLayout.from_lengths([*batch["layout"].lengths.tolist(), spare])
    return batch
