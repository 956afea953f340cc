"""Semantic textual similarity: do cosines order pairs of sentences as people do?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from llm2vec_fast.encoder import LLM2Vec
from llm2vec_fast.errors import UserError


def sts_spearman(
    encoder: LLM2Vec, first: Sequence[str], second: Sequence[str], scores: Sequence[float], **options: Any
) -> float:
    """Spearman's rank correlation of the embeddings' cosines with the scores people gave.

    Args:
        encoder: embeds each sentence once.
        first, second: the pairs' sentences.
        scores: how alike people found them, on any scale.
        options: passed on to `LLM2Vec.encode`, such as ``instruction``.

    Returns:
        A number from −1 to 1; papers print it times 100.

    Raises:
        UserError: the three differ in length, hold fewer than two pairs, or SciPy is not installed.

    Source: the measure of STS-B (Cer et al., 2017, arXiv:1708.00055) as in SentEval and MTEB.
    """
    try:
        from scipy.stats import spearmanr
    except ModuleNotFoundError as error:
        raise UserError("rank correlation needs the package scipy: pip install 'llm2vec-fast[eval]'") from error
    if not len(first) == len(second) == len(scores) > 1:
        raise UserError(
            f"there are {len(first)} and {len(second)} sentences and {len(scores)} scores: give two or more pairs"
        )
    texts = list(dict.fromkeys([*first, *second]))
    rows = dict(zip(texts, encoder.encode(texts, normalize=True, convert_to_numpy=True, **options), strict=True))
    cosines = [float(np.dot(rows[one], rows[other])) for one, other in zip(first, second, strict=True)]
    return float(spearmanr(cosines, scores).statistic)
