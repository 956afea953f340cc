"""Exact search for hard negatives, a block of queries against slices of all documents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llm2vec_fast.loading import best_device
from llm2vec_fast.mining.settings import MiningSettings
from llm2vec_fast.mining.texts import MiningTexts

DOCUMENTS_AT_ONCE = 16384


@dataclass(frozen=True)
class Found:
    """Hard negatives of some rows, nearest first.

    Attributes:
        places: (n, k) int64, numbers of documents, −1 where there are no more.
        scores: (n, k) float32, their cosines to the query.
        positives: (n,) float32, the cosine of the row's own document; NaN where a text could not be embedded.
    """

    places: np.ndarray
    scores: np.ndarray
    positives: np.ndarray


def find_negatives(
    queries: np.ndarray,
    documents: np.ndarray,
    texts: MiningTexts,
    first: int,
    settings: MiningSettings,
    after_slice: Callable[[], None] = lambda: None,
) -> Found:
    """Search all documents for hard negatives of the rows from ``first`` on.

    Args:
        queries: (n, d) float32 of length 1, NaN where a text could not be embedded.
        documents: (m, d) of the same kind, all of them; read a slice at a time.
        texts: which belong together.
        first: the number of the first of these queries.
        settings: how many, and below which share of the row's own.
        after_slice: called after each slice of documents; what it raises ends the search.
    """
    device = torch.device(settings.encoder.device) if settings.encoder.device else best_device()
    block = _tensor(queries, device)
    own = _own_scores(queries, documents, texts, first).to(device)
    limits = torch.where(own > 0, settings.share * own, own)  # below 0 a share of it would be above it
    known = _known(texts, first, len(block)).to(device)
    wanted = settings.skip + settings.negatives
    scores, places = block.new_empty(len(block), 0), known.new_empty(len(block), 0)
    for start in range(0, len(documents), DOCUMENTS_AT_ONCE):
        part = _tensor(documents[start : start + DOCUMENTS_AT_ONCE], device)
        new = block @ part.T
        # A comparison with NaN is false: what could not be embedded is never a negative, and has none.
        new.masked_fill_(~(new < limits[:, None]), -torch.inf)
        ids = _tensor(texts.document_ids[start : start + len(part)], device)
        for each in known.unbind(1):
            new.masked_fill_(each[:, None] == ids, -torch.inf)
        nearest, columns = new.topk(min(wanted, len(part)), dim=1)
        merged, order = torch.cat([scores, nearest], 1).sort(dim=1, descending=True, stable=True)
        places = torch.cat([places, columns + start], 1).gather(1, order)[:, :wanted]
        scores = merged[:, :wanted]
        after_slice()
    scores, places = scores[:, settings.skip :], places[:, settings.skip :]
    places = places.masked_fill(scores == -torch.inf, -1)
    return Found(places.numpy(force=True), scores.numpy(force=True), own.numpy(force=True))


def _own_scores(queries: np.ndarray, documents: np.ndarray, texts: MiningTexts, first: int) -> Tensor:
    """(n,) the lowest cosine of each row to a document of its own."""
    own = [(documents[texts.positives[first + i]] @ query).min() for i, query in enumerate(queries)]
    return torch.from_numpy(np.array(own, np.float32))


def _known(texts: MiningTexts, first: int, count: int) -> Tensor:
    """(n, k) int64 ids known to suit the rows from ``first`` on; shorter rows repeat their last."""
    rows = [texts.known.of_row(first + i) for i in range(count)]
    most = max(map(len, rows))
    return torch.tensor([[*row, *row[-1:] * (most - len(row))] for row in rows])


def _tensor(mapped: np.ndarray, device: torch.device) -> Tensor:
    """A copy: what is mapped from a file cannot be written to, which tensors could be."""
    return torch.from_numpy(np.array(mapped)).to(device)
