"""Tiles copied by descriptor, and heads split into two blocks of columns, are as exact as plain ones."""

from itertools import product

import pytest
import torch
from attention_cases import Case, make_layout, three_ways
from numerics import GRADIENT_FACTOR, assert_error_within
from pairwise import pairwise

from llm2vec_fast.kernels import launch
from llm2vec_fast.kernels.attention import attention, configurations
from llm2vec_fast.kernels.attention.configurations import Configuration, Demand
from llm2vec_fast.kernels.attention.triton_launch import Rule, describable

CHOICES = ("forward", "backward_keys", "backward_queries")
LENGTHS = (35, 1, 0)
RULES = {
    "plain": {},
    "window": {"window": 20},
    "causal": {"causal": True},
    "all": {"causal": True, "window": 20, "softcap": 2.0, "dropout_p": 0.3, "seed": 5},
}
SIZES = (40, 72, 80, 96, 160)
COPIES = {"pointers": {}, "descriptors": {"described": True}, "together": {"described": True, "together": True}}


def _choose(monkeypatch, config):
    for name in CHOICES:
        monkeypatch.setattr(configurations, name, lambda *_: config)


def _everything(q, k, v, layout, **settings):
    """Output, lse and the three gradients."""
    tensors = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = attention(*tensors, layout, return_lse=True, **settings)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float16)
    return out, lse, *torch.autograd.grad(out, tensors, upstream.to(out.dtype))


def _assert_exact(case, dtype):
    results = three_ways(case, dtype, "triton", call=_everything)
    for name, *three in zip(("output", "lse", "dq", "dk", "dv"), *results, strict=True):
        factor = GRADIENT_FACTOR if name.startswith("d") else 2.0
        assert_error_within(*three, factor=factor, name=name)


@pytest.mark.parametrize(
    ("described", "split", "layout", "rule"),
    [
        tuple(case.values())
        for case in pairwise(described=(False, True), split=(False, True), layout=("packed", "both"), rule=RULES)
    ],
)
def test_every_loop_with_small_tiles(monkeypatch, described, split, layout, rule):
    _choose(monkeypatch, Configuration(16, 32, 4, 2, described, split, tail=16))
    _assert_exact(Case(LENGTHS, 2, 1, 40, layout, RULES[rule]), torch.float32)


@pytest.mark.parametrize("head_dim", SIZES)
@pytest.mark.parametrize("copies", COPIES)
def test_split_heads_of_every_size(monkeypatch, copies, head_dim):
    _choose(monkeypatch, Configuration(32, 16, 4, 2, **COPIES[copies], split=True))
    _assert_exact(Case((20, 9), 2, 1, head_dim), torch.float16)


@pytest.mark.parametrize("rule", [rule for rule, settings in RULES.items() if "dropout_p" not in settings])
@pytest.mark.parametrize("copies", COPIES)
def test_a_product_that_starts_from_minus_delta(monkeypatch, copies, rule):
    _choose(monkeypatch, Configuration(16, 32, 4, 2, **COPIES[copies], tail=16, folded=True))
    _assert_exact(Case(LENGTHS, 2, 1, 40, "both", RULES[rule]), torch.float16)


@pytest.mark.parametrize("rule", RULES)
def test_descriptors_give_the_bits_that_pointers_give(monkeypatch, rule):
    case = Case(LENGTHS, 2, 1, 24, "left", RULES[rule])
    results = []
    for copies in COPIES.values():
        _choose(monkeypatch, Configuration(16, 32, 4, 2, **copies))
        inputs = case.inputs(torch.float16)
        results.append(_everything(*inputs, case.sequence_layout(), backend="triton", **case.settings))
    assert all(torch.equal(x, y) and torch.equal(x, z) for x, y, z in zip(*results, strict=True))


@pytest.mark.parametrize("copies", ["descriptors", "together"])
def test_a_descriptor_ends_with_its_sequence(monkeypatch, copies):
    _choose(monkeypatch, Configuration(16, 16, 4, 2, **COPIES[copies]))
    case = Case((40, 70, 3))
    tensors = case.inputs(torch.float32)
    alone = _everything(*(x[:40] for x in tensors), make_layout("packed", (40,)), backend="triton")
    for x in tensors:
        x[40:110] = float("nan")
    together = _everything(*tensors, case.sequence_layout(), backend="triton")
    for ours, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(ours[:40], expected)


@pytest.mark.parametrize("architecture", ["sm_90", "sm_100", "gfx942"])
def test_what_is_chosen_for_other_chips_computes_the_same(monkeypatch, architecture):
    monkeypatch.setattr(launch, "architecture_of", lambda _: architecture)
    for head_dim in (64, 80):
        _assert_exact(Case((131, 9), 2, 1, head_dim), torch.float16)


def test_tensors_that_no_descriptor_can_describe_are_known():
    x = torch.zeros(40, 4, 80, dtype=torch.float16)
    assert describable(x, x[3:, 1:, :64])
    assert not describable(x, x[:, :, 1:65])  # starts beside a multiple of 16 bytes
    assert not describable(x.new_zeros(40, 4, 20))  # heads start beside them
    assert not describable(x[:1, :1].expand(40, 4, 80))


@pytest.mark.parametrize("choose", [getattr(configurations, name) for name in CHOICES])
def test_they_are_then_read_by_pointers(choose):
    assert choose(64, torch.float16, "sm_90", True, Demand.PLAIN).described
    assert not choose(64, torch.float16, "sm_90", False, Demand.PLAIN).described
    assert not choose(64, torch.float16, "sm_80", True, Demand.PLAIN).described


@pytest.mark.parametrize(
    ("rule", "demand"),
    [
        (Rule(False, None, None, 1.0, 0, None), Demand.PLAIN),
        (Rule(True, None, None, 1.0, 0, None), Demand.RULED),
        (Rule(False, 0, None, 1.0, 0, None), Demand.RULED),
        (Rule(False, None, 30.0, 1.0, 0, None), Demand.RULED),
        (Rule(True, 5, 30.0, 1.0, 9, None), Demand.DROPOUT),
    ],
    ids=str,
)
def test_what_a_rule_demands(rule, demand):
    assert rule.demand is demand


@pytest.mark.parametrize("kernel", ["backward_keys", "backward_queries"])
def test_steps_that_would_read_past_the_padded_rows_are_refused(monkeypatch, kernel):
    _choose(monkeypatch, Configuration(16, 16, 4, 2))
    monkeypatch.setattr(configurations, kernel, lambda *_: Configuration(256, 16, 4, 2))
    case = Case((1,), head_dim=16)
    with pytest.raises(AssertionError, match="256"):
        _everything(*case.inputs(torch.float32), case.sequence_layout(), backend="triton")


@pytest.mark.parametrize("head_dim", range(16, 257, 8))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_every_head_size_has_a_configuration_on_every_chip(dtype, head_dim):
    for choose, architecture, by_descriptor, demand in product(
        (getattr(configurations, name) for name in CHOICES),
        ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942"),
        (False, True),
        Demand,
    ):
        config = choose(head_dim, dtype, architecture, by_descriptor, demand)
        assert sum(config.widths(head_dim)) >= head_dim
        assert not (config.folded and demand is Demand.DROPOUT)  # which would scale what the product starts from


@pytest.mark.parametrize(
    ("head_dim", "widths"),
    [(8, (16, 0)), (16, (16, 0)), (40, (32, 16)), (64, (64, 0)), (80, (64, 16)), (96, (64, 32)), (112, (128, 0)),
     (160, (128, 32)), (256, (256, 0))],
)  # fmt: skip
def test_heads_are_split_only_where_it_saves_columns(head_dim, widths):
    assert Configuration(16, 16, 4, 2, split=True).widths(head_dim) == widths
    assert Configuration(16, 16, 4, 2).widths(head_dim) == (configurations.block_d(head_dim), 0)
