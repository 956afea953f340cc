"""LoRA layers of an accelerated model: trained by the lean operation where it applies, by peft's code elsewhere."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from numerics import GRADIENT_FACTOR, assert_error_within
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import SHAPE, tiny_model
from torch import Tensor, nn

import llm2vec_fast.acceleration.lora as lora
from llm2vec_fast.acceleration import accelerate, restore

IDS = torch.randint(3, SHAPE["vocab_size"], (2, 17), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The dropout share of every call of the lean operation."""
    shares: list[float] = []
    stock = lora.lora_linear

    def count(*args: object) -> Tensor:
        shares.append(args[-1])
        return stock(*args)

    monkeypatch.setattr(lora, "lora_linear", count)
    return shares


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class DoubledLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def adapted(dtype: torch.dtype = torch.float32, **settings: object) -> PeftModel:
    torch.manual_seed(3)
    config = LoraConfig(**{"r": 4, "target_modules": "all-linear", "init_lora_weights": False} | settings)
    return get_peft_model(tiny_model("llama").to(dtype), config).train()


def output_and_gradients(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    out = model(input_ids=IDS, use_cache=False).last_hidden_state
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype))
    return out.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_float32_adapters_train_as_exactly_as_with_peft(dtype: torch.dtype, calls: list[float]) -> None:
    model = adapted(dtype)
    plain, plain_gradients = output_and_gradients(model)
    exact, exact_gradients = output_and_gradients(copy.deepcopy(model).double())
    report = accelerate(model, attention=False, norm=False, rotary=False, swiglu=False, loss=False)
    assert report.swapped["lora"] == 7 * SHAPE["num_hidden_layers"]
    ours, gradients = output_and_gradients(model)
    assert len(calls) == report.swapped["lora"]
    assert_error_within(ours, plain, exact)
    assert {name: g.dtype for name, g in gradients.items()} == {name: g.dtype for name, g in plain_gradients.items()}
    joined = [torch.cat([g[name].flatten() for name in exact_gradients]) for g in
              (gradients, plain_gradients, exact_gradients)]  # fmt: skip
    assert_error_within(*joined, factor=GRADIENT_FACTOR)


def test_dropout_acts_in_training_only(calls: list[float]) -> None:
    model = adapted(lora_dropout=0.25)
    accelerate(model)
    output_and_gradients(model)
    assert set(calls) == {0.25}
    calls.clear()
    output_and_gradients(model.eval())
    assert set(calls) == {0.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_pass_without_a_graph_gives_the_bits_of_one_with_a_graph(training: bool, dtype: torch.dtype) -> None:
    """Each layer, whatever the dtype that the adapter's weights are kept in."""
    model = adapted(dtype, lora_dropout=0.2).train(training)
    accelerate(model, linear=False)
    layer = model.get_base_model().layers[0].mlp.up_proj
    x = torch.randn(11, SHAPE["hidden_size"], generator=torch.Generator().manual_seed(4)).to(dtype)
    results = []
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        torch.manual_seed(5)
        with mode():
            results.append(layer(x).detach())
    assert torch.equal(results[1], results[0])
    assert torch.equal(results[2], results[0])


@pytest.mark.parametrize(
    "kind",
    ["dora", "bias", "disabled", "merged", "two adapters", "all trained", "hook", "backward hook", "dropout", "part"],
)
def test_what_is_not_plain_runs_as_peft_does(kind: str, calls: list[float]) -> None:
    settings = {"dora": {"use_dora": True}, "bias": {"lora_bias": True}}.get(kind, {})
    model = adapted(**settings)
    if kind == "two adapters":
        model.add_adapter("second", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
        model.base_model.set_adapter(["default", "second"])
    elif kind == "merged":
        model.merge_adapter()
    elif kind == "all trained":
        model.requires_grad_(True)
    elif kind == "hook":
        for name, module in model.named_modules():
            if name.endswith("lora_A.default"):
                module.register_forward_hook(lambda module, args, out: 2 * out)
    elif kind == "backward hook":
        for name, module in model.named_modules():
            if name.endswith("base_layer"):
                module.register_full_backward_hook(lambda module, given, found: None)
    elif kind in ("dropout", "part"):  # of a class of the user's own
        for name, module in model.named_modules():
            if kind == "dropout" and name.endswith("lora_dropout"):
                module["default"] = Doubled()
            elif kind == "part" and name.endswith("lora_A.default"):
                module.__class__ = DoubledLinear

    def run(model: PeftModel) -> Tensor:
        if kind == "disabled":
            with model.disable_adapter():
                return model(input_ids=IDS, use_cache=False).last_hidden_state
        return model(input_ids=IDS, use_cache=False).last_hidden_state

    expected = run(model)
    accelerate(model, attention=False, norm=False, rotary=False, swiglu=False, loss=False, linear=False)
    torch.testing.assert_close(run(model), expected, rtol=0, atol=0)
    assert calls == []


def test_copies_and_pickles_stay_lean_and_restore_undoes_it(calls: list[float]) -> None:
    model = adapted()
    stock = {type(module) for module in model.modules()}
    expected = output_and_gradients(model)[0]
    accelerate(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        calls.clear()
        torch.testing.assert_close(output_and_gradients(twin)[0], expected)
        assert calls
    restore(model)
    assert {type(module) for module in model.modules()} == stock


def test_merging_an_accelerated_model_gives_the_merged_weights() -> None:
    model = adapted()
    expected = copy.deepcopy(model).merge_and_unload().state_dict()
    accelerate(model)
    restore(model)
    merged = model.merge_and_unload().state_dict()
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], expected[name]) for name in expected)
