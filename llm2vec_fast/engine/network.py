"""What the engine needs of an encoder: a decoder that computes token states, and how these become embeddings."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize as unit_length

from ..bidirectional import decoder_of
from ..kernels.layout import SequenceLayout
from ..kernels.pooling import POOLING_MODES, pool
from ..tokenization import TokenizedTexts
from .request import Request, one_of
from .wide import NARROW, in_float32

ROW_STEP = 16  # rows of a batch on a CPU are a multiple of this


@dataclass(frozen=True)
class Network:
    """A decoder in evaluation mode, and the settings with which its rows are pooled.

    Attributes:
        source: the model that ``model`` is a replica of.
    """

    model: nn.Module
    source: nn.Module
    pooling_mode: str

    @property
    def device(self) -> torch.device:
        return device_of(self.source)

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding of tokens."""
        return decoder_of(self.source).get_input_embeddings().weight.shape[0]

    def in_float32(self) -> Network | None:
        """The same computing in float32, if it does not so already."""
        if not any(weight.dtype in NARROW for weight in self.source.parameters()):
            return None
        return replace(self, model=in_float32(self.source))

    def embed(self, tokens: TokenizedTexts, request: Request, batch: np.ndarray) -> Tensor:
        """One forward pass over some texts, packed: (texts, d), or all token rows (tokens, d); float32, on the device.

        Whatever the calling thread has set (gradients, autocast) does not reach in here.
        """
        kind = self.device.type
        plain = torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
        with torch.inference_mode(), plain:
            return self._embed(tokens, request, batch)

    def _embed(self, tokens: TokenizedTexts, request: Request, batch: np.ndarray) -> Tensor:
        device, lengths = self.device, tokens.lengths[batch]
        spare = spare_rows(int(lengths.sum()), device)
        filler = [np.zeros(spare, np.int64)] if spare else []
        ids = torch.from_numpy(np.concatenate([*(tokens.ids[i] for i in batch), *filler])).to(device)
        layout = SequenceLayout.from_lengths(torch.from_numpy(np.append(lengths, spare) if spare else lengths), device)
        rows = hidden_states(self.model, ids[None], layout)
        if request.tokens:
            rows = rows[: int(lengths.sum())]
        else:
            skip = np.append(tokens.skip[batch], np.zeros(len(filler), np.int64))
            skip = torch.from_numpy(skip).to(device) if skip.any() else None
            rows = pooled(rows, layout, self.pooling_mode, skip)[: len(batch)]
        rows = rows.float()[:, : request.width]
        return unit_length(rows, dim=-1) if request.normalize else rows


def device_of(model: nn.Module) -> torch.device:
    """Where a model takes token ids: the device of its embedding, or the one that accelerate loads that to."""
    embedding = decoder_of(model).get_input_embeddings()
    device = embedding.weight.device
    if device.type == "meta":
        device = torch.device(getattr(getattr(embedding, "_hf_hook", None), "execution_device", None) or device)
    return device


def hidden_states(model: nn.Module, input_ids: Tensor, layout: SequenceLayout) -> Tensor:
    """Last hidden state (rows, d) of ids (B, S), or of a packed (1, T)."""
    return decoder_of(model)(input_ids=input_ids, layout=layout, use_cache=False).last_hidden_state.flatten(0, 1)


def pooled(hidden: Tensor, layout: SequenceLayout, mode: str, skip: Tensor | None) -> Tensor:
    """Token rows (rows, d) pooled into (N, d); the first token counts even where a prompt is left out."""
    first = POOLING_MODES[one_of("pooling_mode", mode, tuple(POOLING_MODES))] == "first"  # it may be set at any time
    return pool(hidden, layout, mode, None if first else skip)


def spare_rows(tokens: int, device: torch.device) -> int:
    """Rows of a sequence that nobody asked for, with which a batch has one of few sizes.

    oneDNN generates code for every size it meets, half a MiB for each weight's shape, and keeps it.
    """
    return -tokens % ROW_STEP if device.type == "cpu" and tokens >= ROW_STEP**2 else 0
