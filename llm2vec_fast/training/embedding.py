"""A decoder whose forward pass returns embeddings, and holds activations for a part of the batch only.

A contrastive loss couples all texts of a batch, but only through their embeddings. So a large batch is embedded in
pieces, each computed once more when its gradient is due (the idea of GradCache, Gao et al., 2021, arXiv:2101.06983):
memory is that of a piece and of the embeddings, for one more forward pass. That happens inside the forward method, so
that whatever wraps the model (DistributedDataParallel, FSDP, DeepSpeed, mixed precision) sees one forward pass and one
backward pass, and exchanges gradients once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from llm2vec_fast.acceleration.swapping import subclass, swap
from llm2vec_fast.bidirectional import decoder_of
from llm2vec_fast.kernels.layout import SequenceLayout
from llm2vec_fast.kernels.pooling import POOLING_MODES, pool
from llm2vec_fast.training.chunks import pieces
from llm2vec_fast.training.packing import filled

LOG_SCALE = "log_scale"  # the decoder's parameter
TRAINING = "training"  # the owner of what training swaps


class Embedded(NamedTuple):
    """What `embedding_model` returns: a row (N, d) float32 a text, and the loss's scale where it is learned."""

    rows: Tensor
    scale: Tensor | None


def embedding_model(model: nn.Module, pooling_mode: str, token_budget: int | None, scale: float | None = None) -> None:
    """Let a model's forward pass take ``embed=True`` with ``layout`` and perhaps ``skip``, and return `Embedded`.

    Without it the model does what it did: `LLM2Vec(model, tokenizer)` encodes with it meanwhile.

    Args:
        model: a bidirectional decoder, bare or in a peft model; changed in place.
        pooling_mode: as in `kernels.pool`.
        token_budget: tokens whose activations are held at once; None for all. A longer text runs alone.
        scale: where the loss's scale starts if it is learned: its logarithm becomes a parameter of the decoder.
    """
    decoder = decoder_of(model)
    if scale is not None:
        start = torch.tensor([float(scale)], dtype=torch.float32).log()  # one number in a row: FSDP shards no scalar
        decoder.register_parameter(LOG_SCALE, nn.Parameter(start.to(decoder.device)))
    swap(decoder, _embedding, owner=TRAINING, _pooling_mode=pooling_mode, _token_budget=token_budget)


@cache
def _embedding(stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    def forward(
        self: PreTrainedModel, *, embed: bool = False, skip: Tensor | None = None, **batch: Any
    ) -> Embedded | ModelOutput:
        if not embed:
            return stock.forward(self, **batch)
        return _embedded(self, partial(stock.forward, self), skip, **batch)

    return subclass(stock, forward)


def _embedded(
    decoder: PreTrainedModel,
    run: Callable[..., ModelOutput],
    skip: Tensor | None,
    input_ids: Tensor,
    layout: SequenceLayout,
    position_ids: Tensor,
    **_: Any,
) -> Embedded:
    mode = decoder._pooling_mode
    first = POOLING_MODES[mode] == "first"

    def embed(piece: SequenceLayout, ids: Tensor, positions: Tensor, skip: Tensor | None) -> Tensor:
        batch = filled({"input_ids": ids, "position_ids": positions, "layout": piece})
        hidden = run(**batch, use_cache=False).last_hidden_state[0, : piece.total]
        return pool(hidden, piece, mode, None if first else skip)

    given = [
        (piece, input_ids[:, tokens], position_ids[:, tokens], None if skip is None else skip[texts])
        for piece, texts, tokens in pieces(layout, decoder._token_budget)
    ]
    passes = _passes(decoder, len(given))
    again = partial(checkpoint, embed, use_reentrant=False) if passes > 1 else embed
    rows = [again(*piece) for piece in given]
    one_token = SequenceLayout.from_lengths([1], layout.device), input_ids[:, :1], position_ids[:, :1], None
    with torch.random.fork_rng([decoder.device] if decoder.device.type == "cuda" else []):  # dropout draws as without
        rows += [again(*one_token)[:0] for _ in range(passes - len(given))]
    log_scale = getattr(decoder, LOG_SCALE, None)
    return Embedded(torch.cat(rows), None if log_scale is None else log_scale.exp()[0])


def _passes(decoder: PreTrainedModel, pieces: int) -> int:
    """How many forward passes the batch takes here.

    Where weights are sharded each pass gathers them from all processes: these take as many as the one with the most
    pieces, or they would wait for each other forever.
    """
    if not any(isinstance(x, DTensor) or hasattr(x, "ds_id") for x in decoder.parameters()):  # FSDP2, DeepSpeed
        return pieces
    most = torch.tensor(pieces, device=decoder.device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most)
