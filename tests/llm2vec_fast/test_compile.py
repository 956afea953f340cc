"""A bidirectional model compiles whole and once for batches of any lengths; autocast and checkpoints work with it."""

from __future__ import annotations

import copy
import os
import shutil

import pytest
import torch
from numerics import GRADIENT_FACTOR, assert_error_within
from tiny_models import SHAPE, tiny_model
from torch import Tensor, nn
from torch._dynamo.utils import counters

from llm2vec_fast.bidirectional import make_bidirectional
from llm2vec_fast.kernels.dispatch import ENVIRONMENT_VARIABLE
from llm2vec_fast.kernels.layout import SequenceLayout

# PyTorch itself specialises on one sequence, and on sizes that happen to be equal.
MIXES = ((5, 9, 3), (4, 1, 12, 7), (20, 6, 2, 2, 2), (3, 3, 3, 3, 17), (0, 19, 11))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def texts(lengths: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, SHAPE["vocab_size"], (n,), generator=generator) for n in lengths]


def packed(model: nn.Module, lengths: tuple[int, ...]) -> Tensor:
    layout = SequenceLayout.from_lengths(lengths)
    return model(input_ids=torch.cat(texts(lengths))[None], layout=layout).last_hidden_state[0]


def gradients(model: nn.Module, lengths: tuple[int, ...]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(packed(model, lengths).square().sum(), list(model.parameters()))


@pytest.mark.parametrize("backend", ["blocked", "triton"])
def test_it_compiles_whole_and_once_for_many_length_mixes(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, backend)
    model = make_bidirectional(tiny_model("llama", num_hidden_layers=1))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    graphs = []
    for lengths in MIXES:
        for ours, expected in zip(gradients(compiled, lengths), gradients(model, lengths), strict=True):
            torch.testing.assert_close(ours, expected)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == graphs[:1] * len(MIXES)
    assert not counters["graph_break"]


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="inductor needs a C++ compiler")
def test_inductor_compiles_it_whole_and_once_and_as_exact() -> None:
    model = make_bidirectional(tiny_model("llama", num_hidden_layers=1))
    exact_model = copy.deepcopy(model).double()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    graphs = []
    for lengths in MIXES[:3]:
        results = (gradients(each, lengths) for each in (compiled, model, exact_model))
        for ours, plain, exact in zip(*results, strict=True):
            assert_error_within(ours, plain, exact, factor=GRADIENT_FACTOR)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == graphs[:1] * len(graphs)


def test_a_compiled_model_with_a_window_and_checkpointed_layers_has_the_same_gradients() -> None:
    model = make_bidirectional(tiny_model("mistral-window", num_hidden_layers=2)).train()
    expected = gradients(model, MIXES[0])
    model.gradient_checkpointing_enable()
    for step in (model, torch.compile(model, backend="aot_eager", dynamic=True)):
        for ours, theirs in zip(gradients(step, MIXES[0]), expected, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend", ["blocked", "triton"])
def test_autocast_is_as_exact_as_stock_transformers_under_autocast(monkeypatch, backend) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, backend)
    dtype = torch.float16 if backend == "triton" else torch.bfloat16  # Triton's interpreter gets bfloat16 wrong
    stock = tiny_model("llama")
    stock.config.is_causal = False
    with torch.no_grad():
        exact = _one_by_one(stock.double()).double()
        with torch.autocast("cpu", dtype):
            plain = _one_by_one(stock.float())
            ours = packed(make_bidirectional(tiny_model("llama")), MIXES[0])
    assert_error_within(ours, plain, exact)


def _one_by_one(model: nn.Module) -> Tensor:
    return torch.cat([model(input_ids=ids[None], use_cache=False).last_hidden_state[0] for ids in texts(MIXES[0])])
