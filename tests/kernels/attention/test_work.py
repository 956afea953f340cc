"""No product is computed that no query needs: work grows with the window; short texts pay nothing for a long one."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from attention_cases import Case
from torch.utils.flop_counter import FlopCounterMode
from triton.runtime.interpreter import InterpreterBuilder

from llm2vec_fast.kernels.attention import attention, configurations
from llm2vec_fast.kernels.attention.blocked import Rule, blocked_backward, blocked_forward

TILE = 16
# Products of (queries × keys × head size): two forward; backward five, of which Triton's two kernels repeat two.
FORWARD, BACKWARD, BLOCKED_BACKWARD = 2, 7, 5


@pytest.fixture
def small_tiles(monkeypatch):
    for name in ("forward", "backward_keys", "backward_queries"):
        monkeypatch.setattr(configurations, name, lambda *_: configurations.Configuration(TILE, TILE, 4, 2))


@contextmanager
def counted(monkeypatch) -> Iterator[dict[str, int]]:
    """Programs that Triton's interpreter runs inside, and multiplications of their matrix products."""
    count = {"programs": 0, "products": 0}
    set_grid_idx, create_dot = InterpreterBuilder.set_grid_idx, InterpreterBuilder.create_dot

    def counting_grid(self, *index):
        count["programs"] += 1
        return set_grid_idx(self, *index)

    def counting_dot(self, a, b, *rest):
        count["products"] += a.data.shape[-2] * a.data.shape[-1] * b.data.shape[-1]
        return create_dot(self, a, b, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(InterpreterBuilder, "set_grid_idx", counting_grid)
        patch.setattr(InterpreterBuilder, "create_dot", counting_dot)
        yield count


def triton_work(monkeypatch, lengths, **rule) -> tuple[dict[str, int], dict[str, int]]:
    """What the kernels do forward, and backward."""
    case = Case(lengths, 2, 1, TILE)
    tensors = [x.contiguous().requires_grad_() for x in case.inputs(torch.float32)]
    with counted(monkeypatch) as forward:
        out = attention(*tensors, case.sequence_layout(), backend="triton", **rule)
    with counted(monkeypatch) as backward:
        torch.autograd.grad(out, tensors, out.detach())
    return forward, backward


def blocked_work(lengths, window=None, causal=False) -> tuple[int, int]:
    """Multiplications of the matrix products, forward and backward."""
    case = Case(lengths, 2, 1, TILE)
    layout, rule = case.sequence_layout(), Rule(causal, window, None, 0.25, None)
    tensors = case.inputs(torch.float64)  # all of it in our own products
    with FlopCounterMode(display=False) as forward:
        out, lse = blocked_forward(*tensors, layout.starts, layout.lengths, rule, training=False, with_lse=False)
    with FlopCounterMode(display=False) as backward:
        blocked_backward(out, *tensors, out, lse, layout.starts, layout.lengths, rule)
    return forward.get_total_flops() // 2, backward.get_total_flops() // 2


def pairs_of_tiles(lengths) -> int:
    return sum((-(-length // TILE)) ** 2 for length in lengths)


@pytest.mark.parametrize("causal", [False, True], ids=["both-ways", "causal"])
def test_triton_visits_only_the_tiles_in_the_window(small_tiles, monkeypatch, causal):
    length, window = 112, 32
    tiles, reach = length // TILE, window // TILE
    visited = sum(min(i if causal else i + reach, tiles - 1) - max(i - reach, 0) + 1 for i in range(tiles))
    forward, backward = triton_work(monkeypatch, (length,), window=window, causal=causal)
    assert forward["products"] == FORWARD * 2 * visited * TILE**3
    assert backward["products"] == BACKWARD * 2 * visited * TILE**3


def test_a_skewed_batch_costs_triton_no_idle_program_and_no_product_too_many(small_tiles, monkeypatch):
    lengths = (16,) * 7 + (96,)
    forward, backward = triton_work(monkeypatch, lengths)
    assert forward["programs"] == 2 * sum(-(-length // TILE) for length in lengths)
    assert forward["products"] == FORWARD * 2 * pairs_of_tiles(lengths) * TILE**3
    assert backward["products"] == BACKWARD * 2 * pairs_of_tiles(lengths) * TILE**3


@pytest.mark.parametrize("causal", [False, True], ids=["both-ways", "causal"])
def test_blocked_work_grows_with_length_times_window(causal):
    once, twice = (blocked_work((length,), 256, causal) for length in (2048, 4096))
    wider = blocked_work((4096,), 512, causal)
    for short, long, wide in zip(once, twice, wider, strict=True):
        assert long <= 2.1 * short
        assert wide <= 2 * long


def test_a_skewed_batch_costs_blocked_no_product_too_many():
    lengths = (16,) * 500 + (2048,)
    pairs = sum(length**2 for length in lengths)
    forward, backward = blocked_work(lengths)
    assert forward == FORWARD * 2 * pairs * TILE
    assert backward == BLOCKED_BACKWARD * 2 * pairs * TILE
