"""A row that an encoder cannot embed costs that row alone, whatever the encoder does of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from llm2vec_fast.errors import is_out_of_memory

OnBatch = Callable[[int, int, int], None]  # rows, tokens, tokens with padding
OnProblem = Callable[[int, str], None]  # place of a text, and why it has no embedding
Encode = Callable[[Sequence[str], OnBatch, OnProblem], np.ndarray]
ANY_TEXT = "text"  # an encoder that raises for this one too raises for all


class RowByRow:
    """Embeds texts; where that raises, finds out by halves which of them it is that raise.

    Args:
        encode: embeds texts, (N, d) float32, calls back after each forward pass, and tells of texts that it leaves out.
        on_batch: called so. Counts of a call that came to nothing are taken back, as negative numbers. What it raises
            ends the work: it is none of a text's.
    """

    def __init__(self, encode: Encode, on_batch: OnBatch) -> None:
        self._encode = encode
        self._on_batch = on_batch
        self._interrupted = False

    def embed(self, texts: Sequence[str], width: int) -> tuple[np.ndarray, dict[int, str]]:
        """Embeddings (N, width) float32, NaN where a text has none, and the reason for each of those by its place.

        Raises:
            Exception: what the encoder raises for any text, not for some of them alone; or that memory ran out.
        """
        told: dict[int, str] = {}
        try:
            return self._counted(texts, told.__setitem__), told
        except Exception as error:
            if self._is_of_all(error):
                raise
            first_error = error
        if len(texts) == 1:
            return np.full((1, width), np.nan, np.float32), {0: _reason(first_error)}
        half = len(texts) // 2
        first, reasons = self.embed(texts[:half], width)
        second, more = self.embed(texts[half:], width)
        return np.concatenate([first, second]), reasons | {half + place: why for place, why in more.items()}

    def _counted(self, texts: Sequence[str], on_problem: OnProblem) -> np.ndarray:
        done = np.zeros(3, np.int64)

        def count(*numbers: int) -> None:
            try:
                self._on_batch(*numbers)
            except BaseException:
                self._interrupted = True
                raise
            done[:] += numbers

        try:
            return self._encode(texts, count, on_problem)
        except Exception:
            if not self._interrupted:
                self._on_batch(*(-done).tolist())
            raise

    def _is_of_all(self, error: Exception) -> bool:
        """Asked at every failure: a device that breaks down in between must not turn each text into an error row."""
        if self._interrupted or is_out_of_memory(error):
            return True
        try:
            self._encode([ANY_TEXT], lambda *numbers: None, lambda *_: None)
        except Exception:
            return True
        return False


def _reason(error: Exception) -> str:
    lines = str(error).splitlines() or [""]
    return f"the encoder cannot embed it: {type(error).__name__}: {lines[0]}"
