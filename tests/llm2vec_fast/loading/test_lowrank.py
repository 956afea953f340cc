"""Adapters of several stages as one: exactly, or cut to a rank as well as can be."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llm2vec_fast.loading.lowrank import LowRank, joined, update_of_weights


class Decoder(nn.Module):
    """Two layers of two projections each."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({n: nn.Linear(12, 20) for n in ("q_proj", "v_proj")}) for _ in "ab")


def product(rank: int, seed: int) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(20, rank, generator=generator), torch.randn(rank, 12, generator=generator))


def whole(part: LowRank) -> Tensor:
    return part.up.double() @ part.down.double()


NAMES = [f"layers.{i}.{name}" for i in range(2) for name in ("q_proj", "v_proj")]
EVERYWHERE = {name: product(3, i) for i, name in enumerate(NAMES)}
IN_ONE_LAYER = {name: product(2 + i, 10 + i) for i, name in enumerate(NAMES[:2])}


def test_what_is_joined_adds_the_sum() -> None:
    config, weights = joined([EVERYWHERE, IN_ONE_LAYER], Decoder())
    assert config.r == config.lora_alpha == 3 + 3
    assert sorted(config.target_modules) == ["q_proj", "v_proj"]
    found = update_of_weights(weights, dict.fromkeys(NAMES, config.lora_alpha / config.r))
    assert found.keys() == set(NAMES)
    for name in NAMES:
        expected = whole(EVERYWHERE[name]) + (whole(IN_ONE_LAYER[name]) if name in IN_ONE_LAYER else 0)
        torch.testing.assert_close(whole(found[name]), expected)


def test_layers_are_named_whole_where_not_all_of_a_name_are_adapted() -> None:
    config, weights = joined([IN_ONE_LAYER], Decoder())
    assert sorted(config.target_modules) == NAMES[:2]
    assert len(weights) == 4


def test_a_cut_is_the_nearest_of_its_rank() -> None:
    """The error is that of the singular values left out (Eckart and Young, 1936)."""
    config, weights = joined([EVERYWHERE, IN_ONE_LAYER], Decoder(), rank=4)
    assert config.r == config.lora_alpha == 4
    found = update_of_weights(weights, dict.fromkeys(NAMES, 1.0))
    for name, part in IN_ONE_LAYER.items():
        total = whole(EVERYWHERE[name]) + whole(part)
        left_out = torch.linalg.svdvals(total)[4:].square().sum().sqrt()
        assert found[name].down.shape == (4, 12)
        torch.testing.assert_close((whole(found[name]) - total).norm().float(), left_out.float())
