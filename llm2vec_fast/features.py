"""Padded token ids, as collators and the original's `tokenize` have them: made of texts, and unpacked for `forward`."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .kernels.layout import SequenceLayout
from .tokenization import TokenizedTexts


def left_padded(tokens: TokenizedTexts, pad: int) -> dict[str, Tensor]:
    """``input_ids``, ``attention_mask`` and ``embed_mask`` (ones on the text, zeros on its prompt), (B, S) int64."""
    lengths = tokens.lengths
    width = int(lengths.max(initial=0))
    ids = np.full((len(lengths), width), pad, dtype=np.int64)
    for row, text in zip(ids, tokens.ids, strict=True):
        row[width - len(text) :] = text
    column, first = np.arange(width), (width - lengths)[:, None]
    return {
        "input_ids": torch.from_numpy(ids),
        "attention_mask": torch.from_numpy((column >= first).astype(np.int64)),
        "embed_mask": torch.from_numpy((column >= first + tokens.skip[:, None]).astype(np.int64)),
    }


def padding_token(tokenizer: PreTrainedTokenizerBase, decoder: PreTrainedModel) -> int:
    """A token that the decoder's embedding has a row for; a pad token may have been added without one."""
    rows = decoder.get_input_embeddings().weight.shape[0]
    marks = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(mark for mark in marks if mark is not None and mark < rows)


def unpacked(features: Mapping[str, Tensor]) -> tuple[Tensor, SequenceLayout, Tensor | None]:
    """Ids (B, S), their layout, and the leading tokens (B,) of each text that its ``embed_mask`` leaves out."""
    ids, mask, embed_mask = (features.get(name) for name in ("input_ids", "attention_mask", "embed_mask"))
    layout = (
        SequenceLayout.from_shape(*ids.shape, device=ids.device)
        if mask is None
        else SequenceLayout.from_attention_mask(mask)
    )
    return ids, layout, None if embed_mask is None else layout.lengths - embed_mask.sum(1)
