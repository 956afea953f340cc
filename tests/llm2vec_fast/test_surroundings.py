"""What is swapped, and what a model computes then, does not depend on what the caller has set around the swap."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, SHAPE, tiny_model
from torch import Tensor, nn
from transformers.models.llama import modeling_llama

from llm2vec_fast.acceleration import accelerate
from llm2vec_fast.bidirectional import make_bidirectional

IDS = torch.randint(3, SHAPE["vocab_size"], (3, 11), generator=torch.Generator().manual_seed(0))
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: tiny_model("llama"),
    "gemma3": lambda: tiny_model("gemma3"),
    "dynamic-rope-bfloat16": lambda: tiny_model("llama", rope_parameters=DYNAMIC, max_position_embeddings=8).bfloat16(),
    "gpt2-bfloat16": lambda: tiny_model("gpt2", n_embd=32, n_layer=3, n_head=4, n_positions=64).bfloat16(),
}


@contextmanager
def during(setter: Callable[[Any], None], value: object, usual: object) -> Iterator[None]:
    setter(value)
    try:
        yield
    finally:
        setter(usual)


def by_default(dtype: torch.dtype) -> Any:
    return during(torch.set_default_dtype, dtype, torch.float32)


SURROUNDINGS = {
    "default-float16": lambda: by_default(torch.float16),
    "default-bfloat16": lambda: by_default(torch.bfloat16),
    "default-float64": lambda: by_default(torch.float64),
    "default-device": lambda: during(torch.set_default_device, "meta", None),
    "device-context": lambda: torch.device("meta"),
    "inference-mode": torch.inference_mode,
    "deterministic": lambda: during(torch.use_deterministic_algorithms, True, False),
    "autocast": lambda: torch.autocast("cpu", torch.float16),
}


def changed(make: Callable[[], nn.Module], around: Callable[[], Any], both_ways: bool) -> tuple[dict, list[Tensor]]:
    """What was swapped in these surroundings; then, in none, the model's output and gradients."""
    model = make()
    with around():
        if both_ways:
            make_bidirectional(model)
        swapped = accelerate(model).swapped
    out = model(input_ids=IDS).last_hidden_state
    out.float().square().sum().backward()
    return swapped, [out, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("name", MODELS)
def test_a_swap_is_the_same_in_any_surroundings(name: str) -> None:
    for both_ways in (False, True):
        expected, tensors = changed(MODELS[name], torch.enable_grad, both_ways)
        assert len(tensors) > 5
        for around, enter in SURROUNDINGS.items():
            swapped, others = changed(MODELS[name], enter, both_ways)
            assert swapped == expected, around
            assert all(torch.equal(a, b) for a, b in zip(tensors, others, strict=True)), around


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_an_accelerated_model_under_autocast_is_as_exact_as_a_plain_one(family: str) -> None:
    """Norms meet rows of another dtype than their weight there, and leave the rule to the stock code."""
    plain = make_bidirectional(tiny_model(family))
    fast, exact = copy.deepcopy(plain), plain(input_ids=IDS).last_hidden_state
    accelerate(fast)
    with torch.autocast("cpu", torch.bfloat16):
        expected, ours = (model(input_ids=IDS).last_hidden_state for model in (plain, fast))
    assert ours.dtype == expected.dtype
    assert (ours - exact).norm() <= 2 * (expected - exact).norm()


class GatedRMSNorm(nn.Module):
    """Called like a norm, and with more than one argument."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return self.weight * gate * x / (x.square().mean(-1, keepdim=True) + self.variance_epsilon).sqrt()


def test_parts_that_cannot_be_tried_are_left_alone() -> None:
    model = tiny_model("llama")
    model.spare = GatedRMSNorm(model.norm)
    for layer in model.layers:
        layer.mlp.act_fn = nn.PReLU()
    with torch.no_grad():
        expected = model(input_ids=IDS).last_hidden_state
        report = accelerate(model)
        assert "something else" in report.left["GatedRMSNorm"]
        assert "PReLU has no fused form" in report.left["LlamaMLP"]
        torch.testing.assert_close(model(input_ids=IDS).last_hidden_state, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("later", [lambda x: x.to("meta"), lambda x: x.new_empty(0)], ids=["meta", "placeholder"])
def test_a_model_whose_weights_come_later_is_swapped_like_one_that_has_them(later) -> None:
    """As where it is sharded: each layer gets its weight for its call."""
    model, stock = tiny_model("gemma3"), tiny_model("gemma3")
    there = {module: module._parameters for module in model.modules()}
    for module, weights in there.items():
        module._parameters = {
            name: nn.Parameter(later(weight)) for name, weight in weights.items() if weight is not None
        }
    assert accelerate(model, attention=False).swapped == accelerate(stock, attention=False).swapped
    for module, weights in there.items():
        module._parameters = weights
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).last_hidden_state, stock(input_ids=IDS).last_hidden_state)


class NoGpuError(Exception):
    """What another library's kernel raises on a CPU tensor."""


def patched_as_liger_does(model: nn.Module, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """Methods on instances, and another rotary function under the name in transformers' own module."""
    stock_rotary = modeling_llama.apply_rotary_pos_emb

    def turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        if q.dtype == torch.float64:  # as we try it
            raise NoGpuError
        calls.append("rotary")
        return stock_rotary(q, k, cos, sin, unsqueeze_dim)

    def counted(module: nn.Module, name: str) -> None:
        stock = type(module).forward

        def forward(self: nn.Module, x: Tensor) -> Tensor:
            calls.append(name)
            return stock(self, x)

        module.__dict__["forward"] = forward.__get__(module, type(module))

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", turned)
    for module in model.modules():
        kind = type(module).__name__
        if kind in ("LlamaRMSNorm", "LlamaMLP"):
            counted(module, kind)
    return model


@pytest.mark.parametrize("both_ways", [False, True], ids=["causal", "bidirectional"])
def test_what_another_library_has_patched_stays_its_own(both_ways: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, calls = tiny_model("llama"), []
    plain.config.is_causal = not both_ways
    with torch.no_grad():
        expected = plain(input_ids=IDS, use_cache=False).last_hidden_state
        model = patched_as_liger_does(tiny_model("llama"), calls, monkeypatch)
        if both_ways:
            make_bidirectional(model)
        report = accelerate(model)
        assert set(report.swapped) == (set() if both_ways else {"attention"})
        assert "was replaced" in report.left["LlamaRMSNorm"]
        assert "was replaced" in report.left["LlamaMLP"]
        assert "pairs columns in another way" in report.left["LlamaAttention"]
        calls.clear()
        torch.testing.assert_close(model(input_ids=IDS).last_hidden_state, expected, atol=1e-4, rtol=0)
    assert {name: calls.count(name) for name in calls} == {"LlamaRMSNorm": 7, "LlamaMLP": 3, "rotary": 3}
