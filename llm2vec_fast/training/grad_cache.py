"""Contrastive batches of thousands in the memory of dozens.

A contrastive loss couples every text of a batch, so a batch cannot simply be cut up. But it couples them only through
their embeddings: given the gradient of each embedding, the rest of the backward pass is a sum over texts. So the batch
is embedded piece by piece without a graph, the loss gives the gradients of the embeddings, and each piece is embedded
once more, with a graph, for its part of the model's gradient. (Gao et al., 2021, arXiv:2101.06983.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states


class GradCache:
    """Gradients of ``loss`` over a whole batch, with a graph of ``chunk_size`` rows at a time.

    Use::

        step = GradCache(model, contrastive_loss, chunk_size=64)
        loss = step(query_features, document_features)   # gradients are in model.parameters() now
        optimizer.step()

    Args:
        encode: called with a chunk of one input, returns its embeddings, one row each. A module, or any function. Its
            second call for a chunk draws the same random numbers as the first: dropout drops the same elements.
        loss: called with one tensor of embeddings an input, returns a number. What it holds itself (a learnable scale)
            gets its gradient too.
        chunk_size: rows embedded at once.
        model: the module that ``encode`` runs, where ``encode`` is a function: if it has ``no_sync``
            (DistributedDataParallel), ranks exchange gradients once, with the last chunk. ``encode`` must call this
            wrapper, not the module inside, and every rank have the same number of chunks or more than none.

    Raises:
        ValueError: chunk_size is not positive.

    A loss across ranks must be multiplied by their number, for DistributedDataParallel takes the mean of gradients:
    ``lambda q, d: contrastive_loss(q, d, group=group) * world_size``. Layers that keep statistics of what they see
    (BatchNorm) see every chunk twice.
    """

    def __init__(
        self,
        encode: Callable[[Any], Tensor],
        loss: Callable[..., Tensor],
        chunk_size: int,
        *,
        model: nn.Module | None = None,
    ) -> None:
        if chunk_size < 1:
            raise ValueError(f"chunk_size={chunk_size} is not positive: pass the rows to embed at once")
        self._encode, self._loss, self._chunk_size = encode, loss, chunk_size
        self._model = encode if model is None and isinstance(encode, nn.Module) else model

    def __call__(self, *inputs: Any, factor: float = 1.0, synchronise: bool = True) -> Tensor:
        """Add the gradients of ``factor`` · loss to the parameters' ``grad``; return the loss, detached, unscaled.

        Args:
            inputs: one a tensor of embeddings that the loss takes (queries, documents): each a tensor, a mapping of
                tensors and of what is passed on whole, or a sequence of rows.
            factor: 1 / the number of steps, where gradients are accumulated over several; a gradient scaler's scale.
            synchronise: False in all but the last of several steps that accumulate, under DistributedDataParallel.

        Raises:
            ValueError: an input is empty, its tensors differ in rows, or the encoder returns another number of rows.
        """
        chunks = [list(split(x, self._chunk_size)) for x in inputs]
        embeddings, states = [], []
        for pieces in chunks:
            rows, drawn = zip(*(self._embed(piece) for piece in pieces), strict=True)
            embeddings.append(torch.cat(rows).requires_grad_())
            states.append(list(zip(drawn, [len(x) for x in rows], strict=True)))
            del rows
        with torch.enable_grad():
            loss = self._loss(*embeddings)
            torch.autograd.backward(loss * factor)
        gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in embeddings]
        del embeddings
        self._backward(chunks, states, gradients, synchronise)
        return loss.detach()

    @torch.no_grad()
    def _embed(self, chunk: Any) -> tuple[Tensor, _RandomState]:
        state = _RandomState(chunk, self._model)
        rows = self._encode(chunk)
        if rows.ndim != 2 or rows.shape[0] != count_rows(chunk):
            raise ValueError(
                f"encode returned shape {tuple(rows.shape)} for {count_rows(chunk)} rows: return one embedding a row"
            )
        return rows, state

    def _backward(
        self,
        chunks: list[list[Any]],
        states: list[list[tuple[_RandomState, int]]],
        gradients: list[Tensor],
        synchronise: bool,
    ) -> None:
        """Each chunk again, with a graph."""
        left = sum(len(pieces) for pieces in chunks)
        for pieces, drawn, gradient in zip(chunks, states, gradients, strict=True):
            parts = gradient.split([count for _, count in drawn])
            for piece, (state, _), part in zip(pieces, drawn, parts, strict=True):
                left -= 1
                with self._exchange(synchronise and left == 0), state.replayed(), torch.enable_grad():
                    torch.autograd.backward(self._encode(piece), part)

    def _exchange(self, now: bool) -> AbstractContextManager[Any]:
        no_sync = getattr(self._model, "no_sync", None)
        return nullcontext() if now or no_sync is None else no_sync()


def split(x: Any, size: int) -> Iterator[Any]:
    """A tensor, a mapping or a sequence in pieces of ``size`` rows. What has no rows is passed on whole.

    Raises:
        ValueError: there are no rows, or the tensors of a mapping differ in their number.
    """
    count = count_rows(x)
    for first in range(0, count, size):
        rows = slice(first, min(count, first + size))
        if isinstance(x, Mapping):
            yield {name: value[rows] if _has_rows(value) else value for name, value in x.items()}
        else:
            yield x[rows]


def count_rows(x: Any) -> int:
    """Rows of a tensor, a mapping or a sequence.

    Raises:
        ValueError: there are none, or the tensors of a mapping differ in their number.
    """
    values = [value for value in x.values() if _has_rows(value)] if isinstance(x, Mapping) else [x]
    counts = {len(value) for value in values}
    if len(counts) != 1 or 0 in counts:
        found = f"parts of {sorted(counts)} rows" if counts else "nothing with rows"
        raise ValueError(f"an input of type {type(x).__name__} holds {found}: pass one number of rows, at least one")
    return counts.pop()


def _has_rows(x: Any) -> bool:
    return (isinstance(x, Tensor) and x.ndim > 0) or (isinstance(x, Sequence) and not isinstance(x, str))


class _RandomState:
    """PyTorch's random state before a chunk was embedded: on the CPU and on every device that may take part."""

    def __init__(self, chunk: Any, model: nn.Module | None) -> None:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        self._kind = None if accelerator is None else accelerator.type
        values = list(chunk.values()) if isinstance(chunk, Mapping) else [chunk]
        tensors = [*values, *(() if model is None else model.parameters())]
        devices = {x.device for x in tensors if isinstance(x, Tensor) and x.device.type == self._kind}
        if accelerator is not None:  # texts reach their device only in the encoder
            devices.add(torch.device(accelerator.type, torch.accelerator.current_device_index()))
        self._cpu = torch.get_rng_state()
        self._devices, self._states = get_device_states(*(torch.empty(0, device=device) for device in devices))

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Inside, that state; afterwards, the state of before, as though nothing had been drawn."""
        with torch.random.fork_rng(self._devices, device_type=self._kind or "cuda"):
            torch.set_rng_state(self._cpu)
            set_device_states(self._devices, self._states, device_type=self._kind)
            yield
