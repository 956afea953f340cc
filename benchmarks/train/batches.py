"""Batches of real texts, the same for every contender: for MNTP with the tokens hidden already."""

from __future__ import annotations

import json
import random

import torch
from torch import Tensor

from benchmarks.fetch import sentences

MNTP_BATCH, MNTP_LENGTH = 32, 128
SIMCSE_BATCH, SIMCSE_LENGTH = 32, 128  # of 64 sentences, twice each, a step of stock code takes 22 GiB
MNTP, SIMCSE, BY_LENGTH = STAGES = ("mntp", "simcse", "simcse, batches by length")
IGNORED = -100


def small_batches(folder: str, stage: str, count: int) -> list[list[Tensor]]:
    """``count`` quarter batches, of which the losses are compared: (2, tokens) ids and labels a text."""
    size = _size(stage) // 4
    return _cut(_texts(folder, stage, size * count), size)


def whole_batches(folder: str, stage: str, count: int) -> list[list[Tensor]]:
    """``count`` batches that are timed.

    For MNTP sentences are joined and cut to one length, as the original does; for SimCSE each keeps its own. By length
    they are sorted over all these batches, as `group_by_length` of transformers' Trainer does, and the batches mixed.
    """
    size = _size(stage)
    texts = _texts(folder, stage, size * count)
    if stage != BY_LENGTH:
        return _cut(texts, size)
    batches = _cut(sorted(texts, key=lambda text: text.shape[1]), size)
    return random.Random(0).sample(batches, len(batches))


def tokens_of(stage: str, batch: list[Tensor]) -> int:
    """The real tokens of a step."""
    return (1 if stage == MNTP else 2) * sum(text.shape[1] for text in batch)


def packed_up(batches: list[list[Tensor]]) -> str:
    """As the one string that goes to a contender's process; `unpacked` undoes it."""
    return json.dumps([[text.tolist() for text in batch] for batch in batches])


def unpacked(given: str) -> list[list[Tensor]]:
    """See `packed_up`."""
    return [[torch.tensor(text) for text in batch] for batch in json.loads(given)]


def padded(texts: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, labels and mask, (texts, longest) each, padded on the right."""
    ids, labels = (
        torch.nn.utils.rnn.pad_sequence([text[row] for text in texts], batch_first=True, padding_value=value)
        for row, value in ((0, 0), (1, IGNORED))
    )
    lengths = torch.tensor([text.shape[1] for text in texts])
    return ids, labels, (torch.arange(ids.shape[1]) < lengths[:, None]).long()


def _size(stage: str) -> int:
    return MNTP_BATCH if stage == MNTP else SIMCSE_BATCH


def _cut(texts: list[Tensor], size: int) -> list[list[Tensor]]:
    return [texts[i : i + size] for i in range(0, len(texts), size)]


def _texts(folder: str, stage: str, count: int) -> list[Tensor]:
    """``count`` texts, (2, tokens): ids and labels."""
    from transformers import AutoTokenizer

    from llm2vec_fast.training.masking import mask_id_of, mask_tokens

    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = random.Random(0).sample(sentences.sentences(), 40_000)
    if stage != MNTP:
        needed = [text for text in texts if len(text.split()) > 3][:count]
        rows = [torch.tensor(ids[:SIMCSE_LENGTH]) for ids in tokenizer(needed)["input_ids"]]
        return [torch.stack([ids, torch.full_like(ids, IGNORED)]) for ids in rows]
    joined = torch.tensor([i for ids in tokenizer(texts)["input_ids"] for i in ids])
    first = torch.zeros(MNTP_LENGTH, dtype=torch.bool)
    first[0] = True  # no output comes before it
    mask, generator = (mask_id_of(tokenizer, "blank"), len(tokenizer)), torch.Generator().manual_seed(0)
    return [
        torch.stack(mask_tokens(row, first, *mask, probability=0.2, masking="default", generator=generator))
        for row in joined[: count * MNTP_LENGTH].view(-1, MNTP_LENGTH)
    ]
