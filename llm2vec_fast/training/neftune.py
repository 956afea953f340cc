"""NEFTune (Jain et al., 2023, arXiv:2310.05914) of a packed batch: noise on embedded tokens while training."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from llm2vec_fast.acceleration.swapping import subclass, swap
from llm2vec_fast.bidirectional import decoder_of
from llm2vec_fast.kernels.layout import SequenceLayout
from llm2vec_fast.training.embedding import TRAINING


def add_noise(model: nn.Module, alpha: float) -> None:
    """Let a bidirectional decoder add uniform noise of ± alpha / √(L · d) to its embedded tokens while it trains.

    L is the length of the token's own sequence, as if that were alone in its batch, and d the width; transformers' own
    hook takes the whole packed row for one sequence. The noise is drawn by torch's generator: a forward pass that is
    computed once more from its state draws the same.

    Args:
        model: a decoder that attends both ways, bare, with a head or in a peft model; changed in place.
        alpha: the paper's; 5 to 15 are usual.
    """
    decoder, noise = decoder_of(model), _Noise(alpha)
    swap(decoder, _noisy, owner=TRAINING, _noise=noise)
    decoder.get_input_embeddings().register_forward_hook(noise.added)


@cache
def _noisy(stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    def forward(self: PreTrainedModel, **batch: Any) -> ModelOutput:
        if self.training:  # another thread may encode with a replica meanwhile
            self._noise.layout = batch["layout"]  # that of a piece, where a batch is embedded in pieces
        return stock.forward(self, **batch)

    return subclass(stock, forward)


class _Noise:
    """What one decoder's forward pass tells its embedding."""

    layout: SequenceLayout

    def __init__(self, alpha: float) -> None:
        self._alpha = alpha

    def added(self, embedding: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """output (B, S, d) → the same with noise; as it is outside of training."""
        if not embedding.training:
            return output
        layout = self.layout
        rows = layout.lengths if layout.padded_shape is None else layout.padded_shape[1]
        lengths = torch.repeat_interleave(layout.lengths, rows, output_size=layout.total).clamp(min=1)
        scale = self._alpha / (lengths * output.shape[-1]).sqrt()
        return output + torch.zeros_like(output).uniform_(-1, 1) * scale.to(output.dtype).view(*output.shape[:2], 1)
