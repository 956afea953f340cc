"""How many of a batch's negatives are none: counted before training, and told."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from itertools import repeat

import numpy as np

logger = logging.getLogger(__name__)

SAMPLE = 4096  # rows of a data set that are looked at: 16 million pairs
_WORTH_TELLING = 0.001


def some_rows(size: int, first: int = 0) -> list[int]:
    """The numbers of at most SAMPLE of the rows from ``first`` on."""
    return (first + np.random.default_rng(0).permutation(size)[:SAMPLE]).tolist()


def share_left_out(ids: Sequence[int], known: Sequence[Sequence[int]] | None = None) -> float:
    """Of the pairs of a row's query and another row's document, the share that are known to belong together.

    Args:
        ids: of each row's document.
        known: of each row, the ids of further documents that are known to suit its query.
    """
    rows, of_documents = len(ids), Counter(ids)
    left = (sum(of_documents[x] for x in {own, *more}) - 1 for own, more in zip(ids, known or repeat(()), strict=False))
    return sum(left) / max(1, rows * (rows - 1))


def tell_share_left_out(name: str, ids: Sequence[int], known: Sequence[Sequence[int]] | None = None) -> None:
    """Say of a data set which share of its in-batch pairs are no negatives, where it is worth it."""
    share = share_left_out(ids, known)
    if share >= _WORTH_TELLING:
        logger.warning(
            "%s: %.1f %% of the pairs of a query and another row's document belong together and are no negatives",
            name, 100 * share,
        )  # fmt: skip
