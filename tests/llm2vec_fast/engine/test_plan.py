"""Token-budget plans."""

from __future__ import annotations

from math import ceil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm2vec_fast.engine.plan import even_budget, plan_batches


@given(st.lists(st.integers(0, 300), max_size=200), st.integers(1, 500))
def test_every_text_runs_once_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = plan_batches(lengths, budget)
    assert sorted(i for batch in batches for i in batch.tolist()) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or sum(lengths[i] for i in batch) <= budget


@given(st.lists(st.integers(0, 300), max_size=200), st.integers(1, 500))
def test_batches_go_from_long_texts_to_short_ones(lengths: list[int], budget: int) -> None:
    planned = [lengths[i] for batch in plan_batches(lengths, budget) for i in batch]
    assert planned == sorted(lengths, reverse=True)


def test_a_plan_is_the_same_at_every_run() -> None:
    lengths = np.random.default_rng(0).integers(1, 90, 1000)
    for first, second in zip(plan_batches(lengths, 512), plan_batches(lengths, 512), strict=True):
        assert np.array_equal(first, second)


def test_batches_are_nearly_full() -> None:
    lengths = np.random.default_rng(0).integers(1, 90, 10_000)
    assert len(plan_batches(lengths, 2048)) <= 1.05 * lengths.sum() / 2048 + 1


@given(st.integers(1, 10**6), st.integers(1, 5000), st.integers(2, 64))
def test_an_even_budget_gives_every_worker_the_same_number_of_batches(tokens: int, budget: int, workers: int) -> None:
    even = even_budget(tokens, budget, workers)
    rounds = ceil(tokens / (budget * workers))
    assert even <= budget
    assert ceil(tokens / even) <= rounds * workers
    assert (even - 1) * rounds * workers < tokens  # and no larger than that takes


def test_one_worker_keeps_the_budget() -> None:
    assert even_budget(100, 2048, 1) == 2048


def test_a_budget_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="token_budget=0"):
        plan_batches([1, 2], 0)
