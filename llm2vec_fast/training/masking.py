"""Which tokens masked next-token prediction hides, and what it puts in their place."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llm2vec_fast.errors import UserError

IGNORED = -100
MASKINGS = ("default", "all_mask")
MASK_TOKENS = ("blank", "eos", "mask")
_BLANK = "_"
_REPLACED, _RANDOM = 0.8, 0.1  # BERT's shares of the chosen tokens; the rest stays as it is


def mask_tokens(
    ids: Tensor,
    special: Tensor,
    mask_id: int,
    vocabulary: int,
    *,
    probability: float,
    masking: str,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Hide tokens of a batch.

    Args:
        ids: (T,) int64 token ids.
        special: (T,) bool, tokens that are never chosen: the tokenizer's own, such as a begin token, and the first of
            each text, which no output predicts.
        mask_id: what stands for a hidden token.
        vocabulary: random tokens are drawn below this, special ones too, as transformers' collator does.
        probability: share of the other tokens that is chosen.
        masking: "default" replaces 80 % of the chosen ones by the mask, 10 % by a random token, and keeps 10 %;
            "all_mask" replaces them all.
        generator: where the random numbers come from.

    Returns:
        Ids with tokens hidden, and labels: the ids of the chosen tokens, −100 elsewhere; both (T,).

    Source: BERT (arXiv:1810.04805) for "default"; LLM2Vec (arXiv:2404.05961), appendix on training details.
    """
    chosen = (torch.rand(ids.shape, generator=generator) < probability) & ~special
    labels = ids.masked_fill(~chosen, IGNORED)
    if masking == "all_mask":
        return ids.masked_fill(chosen, mask_id), labels
    fate = torch.rand(ids.shape, generator=generator)
    drawn = torch.randint(vocabulary, ids.shape, generator=generator, dtype=ids.dtype)
    hidden = ids.masked_fill(chosen & (fate < _REPLACED), mask_id)
    at_random = chosen & (fate >= _REPLACED) & (fate < _REPLACED + _RANDOM)
    return torch.where(at_random, drawn, hidden), labels


def mask_id_of(tokenizer: PreTrainedTokenizerBase, kind: str, rows: int | None = None) -> int:
    """The id that hides a token: that of "_" (blank), of the end token, or of the tokenizer's own mask token.

    Args:
        kind: see `MntpArguments.mask_token_type`.
        rows: of the model's embedding.

    Raises:
        UserError: the tokenizer has no such token, or the model no embedding of it.
    """
    token = {"blank": _BLANK, "eos": tokenizer.eos_token, "mask": tokenizer.mask_token}[kind]
    found = None if token is None else tokenizer.get_vocab().get(token)  # the unknown token may be the end token, too
    others = f"choose another of {', '.join(MASK_TOKENS)}"
    if found is None:
        raise UserError(f"mask_token_type={kind} needs a token that this tokenizer does not have: {others}")
    if rows is not None and found >= rows:
        raise UserError(
            f"mask_token_type={kind} is the token {token!r} with the id {found}, beyond the {rows:,} rows of the "
            f"model's embedding: {others}, or resize the embedding (resize_token_embeddings)"
        )
    return int(found)
