"""Token-budget plans."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm2vec_fast.engine.plan import CPU_LEAST_TOKENS, even_count, plan_batches


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


@given(st.integers(0, 10**6), st.integers(1, 5000))
def test_an_even_count_fills_batches_within_the_budget(tokens: int, budget: int) -> None:
    count = even_count(tokens, budget)
    assert tokens / count <= budget
    assert count == 1 or tokens / count >= min(budget, CPU_LEAST_TOKENS) / 3  # none is made tiny to be even


@pytest.mark.parametrize("tokens", [10_000, 33_000, 51_000, 400_000])
def test_many_texts_come_out_even_on_any_usual_number_of_cores(tokens: int) -> None:
    lengths = np.random.default_rng(0).integers(1, 90, tokens // 45)
    batches = plan_batches(lengths, 2048, even_count(int(lengths.sum()), 2048))
    sizes = [int(lengths[batch].sum()) for batch in batches]
    assert len(batches) % 8 == 0
    assert max(sizes) - min(sizes) <= 180  # two texts: the last batch is no crumb


@given(st.lists(st.integers(0, 300), max_size=200), st.integers(1, 500), st.integers(1, 20))
def test_shared_out_batches_keep_to_the_budget_too(lengths: list[int], budget: int, count: int) -> None:
    batches = plan_batches(lengths, budget, count)
    assert sorted(i for batch in batches for i in batch.tolist()) == list(range(len(lengths)))
    assert all(len(batch) == 1 or sum(lengths[i] for i in batch) <= budget for batch in batches)


def test_a_budget_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="token_budget=0"):
        plan_batches([1, 2], 0)
