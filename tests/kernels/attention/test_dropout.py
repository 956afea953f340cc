"""Dropout drops the same elements on every backend and in every layout, at the rate asked for, independently."""

import pytest
import torch
from attention_cases import Case, make_layout, three_ways
from numerics import assert_error_within

from llm2vec_fast.kernels.attention import attention
from llm2vec_fast.kernels.attention.dropout import Dropout, gain_of, threshold_of

LENGTHS = (70, 0, 9)


def _weights(layout, length, heads=2, backend="reference", seed=3, probability=0.3):
    """The dropped attention weights (T, heads, length) that a backend used: values are an identity matrix."""
    total = layout.total
    q = torch.zeros(total, heads, length)
    v = torch.zeros(total, heads, length)
    v[layout.rows, :, layout.position_ids[layout.rows]] = 1.0
    return attention(q, q, v, layout, dropout_p=probability, seed=seed, backend=backend)


@pytest.mark.parametrize("backend", ["blocked", "triton"])
@pytest.mark.parametrize("kind", ["packed", "left", "right"])
def test_every_backend_and_layout_drops_the_same_elements(backend, kind):
    lengths = (70, 0, 9)
    packed, layout = make_layout("packed", lengths), make_layout(kind, lengths)
    expected = _weights(packed, 70)[packed.rows] != 0
    assert torch.equal(_weights(layout, 70, backend=backend)[layout.rows] != 0, expected)
    assert not torch.equal(_weights(layout, 70, backend=backend, seed=4)[layout.rows] != 0, expected)


@pytest.mark.parametrize("backend", ["reference", "blocked", "triton"])
@pytest.mark.parametrize("kind", ["packed", "left"])
def test_a_pass_without_a_graph_drops_what_one_with_a_graph_drops(backend, kind):
    """Whatever the two group sequences by: their lengths, and a window, differ."""
    layout = make_layout(kind, (40, 3, 9, 11, 1, 9))
    q = torch.randn(layout.total, 2, 40, generator=torch.Generator().manual_seed(1))
    v = torch.zeros(layout.total, 2, 40)
    v[layout.rows, :, layout.position_ids[layout.rows]] = 1.0  # so that the output is the weights
    kept = []
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        torch.manual_seed(6)
        leaves = [x.detach().requires_grad_() for x in (q, q, v)]
        with mode():
            kept.append(attention(*leaves, layout, dropout_p=0.3, window=20, backend=backend)[layout.rows] != 0)
    assert torch.equal(kept[0], kept[1])
    assert torch.equal(kept[0], kept[2])


@pytest.mark.parametrize("rule", [{}, {"window": 20}, {"causal": True}], ids=str)
@pytest.mark.parametrize("backend", ["triton", "blocked"])
def test_output_is_as_exact_as_pytorch_with_the_same_mask(backend, rule):
    case = Case(LENGTHS, 2, 1, settings={"dropout_p": 0.3, "seed": 11, **rule})
    assert_error_within(*three_ways(case, torch.float32, backend))


def test_a_block_of_the_mask_is_a_block_of_the_whole():
    dropout = Dropout(threshold_of(0.5), seed=2**61 + 5)
    whole = dropout.factors(torch.arange(3), torch.arange(4), torch.arange(50), 0, 61)
    part = dropout.factors(torch.tensor([2]), torch.tensor([1, 3]), torch.arange(7, 20), 13, 42)
    assert torch.equal(part, whole[2:, 1::2, 7:20, 13:42])


@pytest.mark.parametrize("probability", [0.1, 0.3, 0.5, 0.9])
def test_it_drops_at_the_rate_asked_for_and_keeps_the_mean(probability):
    kept = Dropout(threshold_of(probability), seed=1).factors(*(torch.arange(n) for n in (4, 4, 128)), 0, 256)
    spread = (probability * (1 - probability) / kept.numel()) ** 0.5
    assert abs(float((kept == 0).double().mean()) - probability) < 5 * spread
    assert float(kept.max()) == pytest.approx(gain_of(threshold_of(probability)))
    assert gain_of(threshold_of(probability)) == pytest.approx(1 / (1 - probability), rel=1e-4)


@pytest.mark.parametrize("along", [0, 1, 2, 3], ids=["sequence", "head", "query", "key"])
def test_neighbours_are_dropped_independently(along):
    kept = Dropout(threshold_of(0.5), seed=9).factors(*(torch.arange(n) for n in (8, 8, 64)), 0, 64)
    signs = (kept > 0).double() * 2 - 1
    for step in (1, 2, 4):
        size = signs.shape[along] - step
        product = signs.narrow(along, 0, size) * signs.narrow(along, step, size)
        assert abs(float(product.mean())) < 5 / product.numel() ** 0.5


def test_different_seeds_drop_independently():
    first, second = (
        (Dropout(threshold_of(0.5), seed).factors(*(torch.arange(n) for n in (4, 4, 64)), 0, 64) > 0).double() * 2 - 1
        for seed in (1, 1 + 2**32)
    )
    assert abs(float((first * second).mean())) < 5 / first.numel() ** 0.5


@pytest.mark.parametrize("backend", ["reference", "blocked", "triton"])
def test_without_a_seed_it_is_drawn_from_pytorch(backend):
    case = Case((40,))
    tensors = case.inputs(torch.float32)
    results = []
    for manual in (1, 1, 2):
        torch.manual_seed(manual)
        results.append(attention(*tensors, case.sequence_layout(), dropout_p=0.5, backend=backend))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
