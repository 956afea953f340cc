"""A stand-in for LLM2Vec in tests of the bulk job: quick, deterministic, and able to misbehave on request."""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Callable, Sequence

import numpy as np

NOT_FINITE = "not-finite"
TOO_LARGE = "too-large"
NO_TOKEN = "no-token"
DIMENSION = 16
WORD_VECTORS = np.random.default_rng(0).standard_normal((1009, DIMENSION)).astype(np.float32)


class FakeEncoder:
    """Embeds a text as the mean of its words' vectors; a token is a word, a batch has ``batch_rows`` rows.

    The text NOT_FINITE gets NaN, NO_TOKEN zeros, TOO_LARGE a value that float16 cannot hold. ``delay`` seconds pass in
    every batch.
    """

    dimension = DIMENSION
    device = "cpu"
    dtype = "float32"
    pooling_mode = "mean"
    max_length = 512
    doc_max_length = 400
    token_budget = 1000

    def __init__(self, batch_rows: int = 256, delay: float = 0.0, broken: Exception | None = None) -> None:
        self.batch_rows = batch_rows
        self.delay = delay
        self.broken = broken
        self.calls = 0
        self.instructions: set[str | None] = set()

    def encode(
        self,
        sentences: Sequence[str],
        *,
        instruction: str | None = None,
        normalize: bool = False,
        truncate_dim: int | None = None,
        convert_to_numpy: bool = True,
        on_batch: Callable[[int, int, int], None] | None = None,
        on_problem: Callable[[int, str], None] | None = None,
    ) -> np.ndarray:
        assert convert_to_numpy
        self.calls += 1
        self.instructions.add(instruction)
        if self.broken is not None:
            raise self.broken
        rows = np.empty((len(sentences), DIMENSION), np.float32)
        for first in range(0, len(sentences), self.batch_rows):
            batch = sentences[first : first + self.batch_rows]
            time.sleep(self.delay)
            for place, text in enumerate(batch, first):
                rows[place] = embedding_of(text)
            if on_batch is not None:
                tokens = sum(len(text.split()) for text in batch)
                on_batch(len(batch), tokens, tokens)
        rows = rows[:, :truncate_dim]
        return rows / np.linalg.norm(rows, axis=1, keepdims=True) if normalize else rows


def embedding_of(text: str) -> np.ndarray:
    """The row (DIMENSION,) that FakeEncoder gives a text."""
    if text == NOT_FINITE:
        return np.full(DIMENSION, np.nan, np.float32)
    if text == NO_TOKEN:
        return np.zeros(DIMENSION, np.float32)
    if text == TOO_LARGE:
        return np.full(DIMENSION, 1e6, np.float32)
    words = [zlib.crc32(word.encode()) % len(WORD_VECTORS) for word in text.split()[:400]]
    return WORD_VECTORS[words].mean(axis=0)


def run_command_line() -> None:
    """`llm2vec-fast` with this encoder; environment variables set its batches, their duration and an error."""
    from llm2vec_fast.bulk import encoding
    from llm2vec_fast.cli import main

    rows, delay = int(os.environ.get("FAKE_ROWS", "256")), float(os.environ.get("FAKE_DELAY", "0"))
    broken = RuntimeError(os.environ["FAKE_BROKEN"]) if "FAKE_BROKEN" in os.environ else None
    encoding.describe_device = lambda device: {"device": device}  # without the seconds that PyTorch takes to import
    encoding.load_encoder = lambda settings: FakeEncoder(rows, delay, broken)
    main()
