"""Contrastive batches of thousands in the memory of dozens.

A contrastive loss couples every text of a batch, so a batch cannot simply be cut up. But it couples them only through
their embeddings: given the gradient of each embedding, the rest of the backward pass is a sum over texts. So the batch
is embedded piece by piece without a graph, the loss gives the gradients of the embeddings, and each piece is embedded
once more, with a graph, for its part of the model's gradient. (Gao et al., 2021, arXiv:2101.06983.)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import get_device_states, set_device_states

from llm2vec_fast.training.chunks import by_rows, by_tokens, count_rows


class GradCache:
    """Gradients of ``loss`` over a whole batch, with the graph of one chunk at a time.

    Use::

        step = GradCache(model, contrastive_loss, chunk_size=64)
        loss = step(query_features, document_features)   # gradients are in model.parameters() now
        optimizer.step()

    or, where the loss is one of several, is scaled, or goes to code that calls ``backward`` itself::

        loss = step.loss(query_features, document_features)
        scaler.scale(loss + 0.1 * other).backward()      # the chunks are embedded again here

    Where gradients are disabled both return the loss and do nothing else.

    An input is a tensor, a mapping of tensors and of what is passed on whole, or a sequence of rows, all with one row a
    text; or a packed batch: a mapping of a `SequenceLayout` under "layout" and of tensors (1, tokens).

    Args:
        encode: called with a chunk of one input, returns its embeddings, one row a text. A module, or any function. Its
            second call for a chunk draws the same random numbers as the first, and runs under the same autocast:
            dropout drops the same elements.
        loss: called with one tensor of embeddings an input, returns a number. What it holds itself (a learnable scale)
            gets its gradient too. It may slice the embeddings, for a Matryoshka loss.
        chunk_size: texts embedded at once; or a function that takes an input and returns its chunks, in order, each of
            which ``encode`` takes.
        token_budget: instead of a size, the tokens embedded at once, so that chunks of short and of long texts are
            equal work. A longer text is alone. Those of a padded input count with their padding.
        model: the module that ``encode`` runs, where ``encode`` is a function: if it has ``no_sync``
            (DistributedDataParallel), ranks exchange gradients once, with the last chunk. ``encode`` must call this
            wrapper, not the module inside, and every rank have the same number of chunks or more than none. Where
            weights are sharded (FSDP) it must be the same number, which ``token_budget`` does not promise.

    Raises:
        ValueError: not one of chunk_size and token_budget was given, or it is not positive.

    A loss across ranks must be multiplied by their number, for DistributedDataParallel takes the mean of gradients:
    ``lambda q, d: contrastive_loss(q, d, group=group) * world_size``. Layers that keep statistics of what they see
    (BatchNorm) see every chunk twice. Texts whose encoder is frozen need no cache: embed them, and let ``loss`` hold
    their embeddings.
    """

    def __init__(
        self,
        encode: Callable[[Any], Tensor],
        loss: Callable[..., Tensor],
        chunk_size: int | Callable[[Any], Iterable[Any]] | None = None,
        *,
        token_budget: int | None = None,
        model: nn.Module | None = None,
    ) -> None:
        if (chunk_size is None) == (token_budget is None):
            raise ValueError(f"chunk_size={chunk_size} and token_budget={token_budget} were passed: pass one of them")
        for name, value in {"chunk_size": chunk_size, "token_budget": token_budget}.items():
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{name}={value} is not positive: pass what to embed at once")
        self._encode, self._loss = encode, loss
        self._counted = not callable(chunk_size)  # whether we know how many texts a chunk holds
        if callable(chunk_size):
            self._chunks = chunk_size
        elif token_budget is not None:
            self._chunks = partial(by_tokens, budget=token_budget)
        else:
            self._chunks = partial(by_rows, size=chunk_size)
        self._model = encode if model is None and isinstance(encode, nn.Module) else model

    def __call__(self, *inputs: Any, factor: float = 1.0, synchronise: bool = True) -> Tensor:
        """Add the gradients of ``factor`` · loss to the parameters' ``grad``; return the loss, detached, unscaled.

        Args:
            inputs: one a tensor of embeddings that the loss takes (queries, documents).
            factor: 1 / the number of steps, where gradients are accumulated over several; a gradient scaler's scale.
            synchronise: False in all but the last of several steps that accumulate, under DistributedDataParallel.

        Raises:
            ValueError: an input is empty, its tensors differ in rows, or does not tell its tokens where these count;
                the encoder returns another number of rows, or embeddings without a gradient.
        """
        embedded = self._embedded(inputs)
        if not torch.is_grad_enabled():
            return self._loss(*(x.rows for x in embedded)).detach()
        embeddings = [x.rows.requires_grad_() for x in embedded]
        chunks = [x.chunks for x in embedded]
        del embedded
        loss = self._loss(*embeddings)
        torch.autograd.backward(loss * factor)
        gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in embeddings]
        del embeddings
        self._backward(chunks, synchronise, gradients)
        return loss.detach()

    def loss(self, *inputs: Any, synchronise: bool = True) -> Tensor:
        """The loss, to be backpropagated later, by ``backward()`` of it or of what is computed from it.

        Its backward pass embeds each chunk once more, as reentrant activation checkpointing does: neither
        ``torch.autograd.grad`` nor ``backward(inputs=…)`` reaches the model. Until then it holds the embeddings and the
        graph of the loss. Under DistributedDataParallel, backpropagate another loss of the same model first, alone and
        under its ``no_sync``.

        Args:
            inputs, synchronise: as when called.

        Raises:
            ValueError: as when called; what the second pass finds is raised by ``backward``.
        """
        embedded = self._embedded(inputs)
        embeddings = [x.rows for x in embedded]
        if not torch.is_grad_enabled():
            return self._loss(*embeddings)
        backward = partial(self._backward, [x.chunks for x in embedded], synchronise)
        return self._loss(*_Later.apply(backward, *(x.requires_grad_() for x in embeddings)))

    def _embedded(self, inputs: tuple[Any, ...]) -> list[_Embedded]:
        """Every input's embeddings, without a graph."""
        embedded = []
        for x in inputs:
            rows, chunks = [], []
            for chunk in self._chunks(x):
                passed = _Pass(chunk, self._model)
                rows.append(self._first_pass(chunk))
                chunks.append(_Chunk(chunk, len(rows[-1]), passed))
            if not chunks:
                raise ValueError(
                    f"chunk_size made no chunk of an input of type {type(x).__name__}: return at least one"
                )
            embedded.append(_Embedded(torch.cat(rows), chunks))
        torch.clear_autocast_cache()  # some releases of PyTorch keep weights there that were cast without a graph
        return embedded

    @torch.no_grad()
    def _first_pass(self, chunk: Any) -> Tensor:
        rows = self._run(chunk)
        if rows.ndim != 2 or (self._counted and rows.shape[0] != count_rows(chunk)):
            texts = f"{count_rows(chunk)} rows" if self._counted else "a chunk"
            raise ValueError(f"encode returned shape {tuple(rows.shape)} for {texts}: return one embedding a row")
        return rows

    def _run(self, chunk: Any) -> Tensor:
        """A copy of a mapping, since some encoders add to the features what they compute."""
        return self._encode(copy.copy(chunk) if isinstance(chunk, Mapping) else chunk)

    def _backward(self, chunks: list[list[_Chunk]], synchronise: bool, gradients: Iterable[Tensor]) -> None:
        """Each chunk again, with a graph, for its part of the model's gradient."""
        left = sum(map(len, chunks))
        for number, (of_input, gradient) in enumerate(zip(chunks, gradients, strict=True), 1):
            parts = gradient.split([chunk.rows for chunk in of_input])
            for chunk, part in zip(of_input, parts, strict=True):
                left -= 1
                with self._exchange(synchronise and left == 0), chunk.passed.again(), torch.enable_grad():
                    rows = self._run(chunk.features)
                    if not rows.requires_grad:
                        raise ValueError(_FROZEN.format(number))
                    torch.autograd.backward(rows, part)

    def _exchange(self, now: bool) -> AbstractContextManager[Any]:
        no_sync = getattr(self._model, "no_sync", None)
        return nullcontext() if now or no_sync is None else no_sync()


_FROZEN = (
    "the embeddings of input {} have no gradient: if all that encode runs for it is frozen, embed it outside and let "
    "the loss hold the embeddings; if the model is under reentrant checkpointing, call its enable_input_require_grads()"
)


class _Chunk(NamedTuple):
    """What is embedded at once, how many embeddings it gave, and what its pass depended on."""

    features: Any
    rows: int
    passed: _Pass


class _Embedded(NamedTuple):
    """An input's embeddings (N, d), and its chunks."""

    rows: Tensor
    chunks: list[_Chunk]


class _Later(torch.autograd.Function):
    """Embeddings whose gradients, once they are there, go to ``backward``."""

    @staticmethod
    def forward(ctx: Any, backward: Callable[[Iterable[Tensor]], None], *embeddings: Tensor) -> tuple[Tensor, ...]:
        ctx.run = backward
        return tuple(x.view_as(x) for x in embeddings)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
        ctx.run(gradients)
        return None, *(None for _ in gradients)


class _Pass:
    """What a forward pass depends on beside its input: PyTorch's random state, on the CPU and on every device that may
    take part, and autocast."""

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
        self._autocast = [
            {
                "device_type": kind, "enabled": torch.is_autocast_enabled(kind),
                "dtype": torch.get_autocast_dtype(kind), "cache_enabled": torch.is_autocast_cache_enabled(),
            }
            for kind in ("cpu", self._kind) if kind is not None and torch.amp.is_autocast_available(kind)
        ]  # fmt: skip

    @contextmanager
    def again(self) -> Iterator[None]:
        """Inside, all of it as it was; afterwards, as before, as though nothing had been drawn."""
        with torch.random.fork_rng(self._devices, device_type=self._kind or "cuda"), ExitStack() as autocast:
            torch.set_rng_state(self._cpu)
            set_device_states(self._devices, self._states, device_type=self._kind)
            for settings in self._autocast:
                autocast.enter_context(torch.autocast(**settings))
            yield
