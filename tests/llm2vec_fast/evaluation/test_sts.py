"""Rank correlation with people's scores, on embeddings that are known."""

from __future__ import annotations

import numpy as np
import pytest

from llm2vec_fast.errors import UserError
from llm2vec_fast.evaluation import sts_spearman


class Angles:
    """Embeds a number of degrees as a direction, and counts what it embeds."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def encode(self, texts: list[str], **options: object) -> np.ndarray:
        assert options == {"normalize": True, "convert_to_numpy": True, "instruction": "turn: "}
        self.texts += texts
        radians = np.deg2rad([float(text) for text in texts])
        return np.stack([np.cos(radians), np.sin(radians)], axis=1)


def test_the_order_of_cosines_is_compared_with_the_order_of_scores() -> None:
    encoder = Angles()
    first, second = ["0", "0", "0", "10"], ["5", "40", "80", "10"]
    options = {"instruction": "turn: "}
    assert sts_spearman(encoder, first, second, [4, 3, 1, 5], **options) == pytest.approx(1)
    assert sts_spearman(encoder, first, second, [1, 3, 4, 0], **options) == pytest.approx(-1)
    # 1 − 6 Σd² / n (n² − 1), with d = 1, 1, 0, 0
    assert sts_spearman(encoder, first, second, [3, 4, 1, 5], **options) == pytest.approx(0.8)
    assert sorted(encoder.texts) == sorted(3 * ["0", "5", "10", "40", "80"])  # each once a call


@pytest.mark.parametrize("scores", [[], [1.0], [1.0, 2.0, 3.0]])
def test_lists_that_do_not_fit_are_refused(scores: list[float]) -> None:
    with pytest.raises(UserError, match=rf"there are 2 and 2 sentences and {len(scores)} scores"):
        sts_spearman(Angles(), ["0", "1"], ["2", "3"], scores)
