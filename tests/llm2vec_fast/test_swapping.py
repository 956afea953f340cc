"""Swaps of classes have owners who do not know of each other."""

from __future__ import annotations

import copy
import pickle

import torch
from tiny_models import tiny_model
from torch import nn

from llm2vec_fast.acceleration import accelerate, restore
from llm2vec_fast.acceleration.swapping import stock_class, subclass, swap, unswap
from llm2vec_fast.bidirectional import make_bidirectional


class Doubled(nn.Linear):
    factor: float

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.factor * super().forward(x)


def negated(stock: type[nn.Module]) -> type[nn.Module]:
    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return -stock.forward(self, x)

    return subclass(stock, forward)


X = torch.ones(1, 2)


def test_an_owner_takes_away_its_own_swaps_in_any_order():
    for first, second in (("a", "b"), ("b", "a")):
        layer = nn.Linear(2, 2)
        plain = layer(X)
        swap(layer, Doubled, owner="a", factor=2.0)
        swap(layer, negated, owner="b")
        torch.testing.assert_close(layer(X), -2 * plain)
        unswap(layer, first)
        torch.testing.assert_close(layer(X), -plain if first == "a" else 2 * plain)
        unswap(layer, second)
        assert torch.equal(layer(X), plain)
        assert type(layer) is nn.Linear
        assert not {"factor", "_swaps", "_stock_class"} & set(vars(layer))


def test_a_swap_done_twice_is_undone_once():
    layer = nn.Linear(2, 2)
    for factor in (2.0, 3.0):
        swap(layer, Doubled, owner="a", factor=factor)
    assert layer.factor == 3.0
    assert stock_class(layer) is nn.Linear
    unswap(layer, "a")
    unswap(layer, "a")
    assert type(layer) is nn.Linear


def test_copies_and_pickles_keep_the_swaps_of_all_owners():
    layer = nn.Linear(2, 2)
    swap(layer, Doubled, owner="a", factor=2.0)
    swap(layer, negated, owner="b")
    for clone in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(clone(X), layer(X))
        unswap(clone, "b")
        torch.testing.assert_close(clone(X), -layer(X))


def test_two_owners_accelerate_one_model():
    """What one of them restores, the other still has; the last one leaves no trace."""
    model, ids = tiny_model("llama"), torch.arange(3, 20)[None]
    stock = [type(m) for m in model.modules()]
    accelerate(model)
    fused = [type(m) for m in model.modules()]
    again = accelerate(model, owner="training")
    assert again.swapped["norm"] > 0
    restore(model)
    assert [type(m) for m in model.modules()] == fused
    model(ids)  # its attention still is the one that its layers' code was given
    restore(model)
    assert [type(m) for m in model.modules()] == fused
    restore(model, owner="training")
    assert [type(m) for m in model.modules()] == stock
    assert model.config._attn_implementation == "eager"


def test_a_default_dtype_of_16_bits_changes_nothing_of_what_is_swapped():
    expected = accelerate(make_bidirectional(tiny_model("llama"))).swapped
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            assert accelerate(make_bidirectional(tiny_model("llama").float())).swapped == expected
        finally:
            torch.set_default_dtype(torch.float32)
