"""Swapped parts give stock results, come off without a trace, and stand aside where they cannot serve."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from numerics import assert_error_within
from peft import LoraConfig, get_peft_model
from tiny_models import FAMILIES, SHAPE, tiny_model
from torch import nn
from transformers import CONFIG_MAPPING, AutoModel

from llm2vec_fast.acceleration import accelerate, restore
from llm2vec_fast.acceleration.linear import PackedLinear
from llm2vec_fast.bidirectional import make_bidirectional
from llm2vec_fast.kernels.linear import packing_problem

packs = pytest.mark.skipif(
    packing_problem(torch.zeros(1, 1, dtype=torch.bfloat16)) is not None, reason="oneDNN has no bf16 here"
)
# Enough rows that the ratio of two largest errors tells something: that of one text varies from 0.4 to 2.9.
IDS = torch.randint(3, SHAPE["vocab_size"], (16, 37), generator=torch.Generator().manual_seed(0))


def bf16_model(family: str) -> nn.Module:
    return make_bidirectional(tiny_model(family).bfloat16())


@torch.no_grad()
def hidden(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).last_hidden_state


@packs
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_are_as_exact_as_the_stock_models(family: str) -> None:
    model = bf16_model(family)
    exact, plain = hidden(copy.deepcopy(model).double()), hidden(model)
    report = accelerate(model)
    assert report.swapped["linear"] > 0
    assert_error_within(hidden(model), plain, exact)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_norms_rotary_embeddings_and_gated_mlps_are_fused(family: str, dtype: torch.dtype) -> None:
    model = make_bidirectional(tiny_model(family).to(dtype))
    norms = sum(type(m).__name__.endswith("RMSNorm") for m in model.modules())
    exact, plain = hidden(copy.deepcopy(model).double()), hidden(model)
    report = accelerate(model)
    assert report.swapped["norm"] == norms
    assert report.swapped["rotary"] == report.swapped["swiglu"] == SHAPE["num_hidden_layers"]
    assert_error_within(hidden(model), plain, exact)


def test_restore_leaves_no_trace() -> None:
    model = bf16_model("llama")
    before = {name: (type(m), sorted(m.__dict__)) for name, m in model.named_modules()}
    stock, keys = hidden(model), list(model.state_dict())
    accelerate(model)
    hidden(model)
    assert list(model.state_dict()) == keys
    restore(model)
    after = {name: (type(m), sorted(m.__dict__)) for name, m in model.named_modules()}
    assert after == before
    assert torch.equal(hidden(model), stock)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_give_the_same_bits(clone) -> None:
    model = bf16_model("llama")
    accelerate(model)
    assert torch.equal(hidden(model), hidden(clone(model)))


def test_a_changed_weight_is_seen() -> None:
    model = bf16_model("llama")
    accelerate(model)
    before = hidden(model)
    with torch.no_grad():
        model.layers[0].mlp.up_proj.weight.mul_(1.5)
    changed = hidden(model)
    restore(model)
    assert not torch.equal(before, changed)
    assert (changed - hidden(model)).abs().max() < (before - changed).abs().max()


@pytest.mark.parametrize("adapter_first", [True, False], ids=["adapter-then-accelerate", "accelerate-then-adapter"])
def test_adapters_work_on_top(adapter_first: bool) -> None:
    def with_adapter(model: nn.Module) -> nn.Module:
        torch.manual_seed(3)
        lora = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        return get_peft_model(model, lora).eval()

    plain = with_adapter(bf16_model("llama"))
    exact, expected = hidden(copy.deepcopy(plain).double()), hidden(plain)
    model = bf16_model("llama")
    if adapter_first:
        model = with_adapter(model)
        accelerate(model)
    else:
        accelerate(model)
        model = with_adapter(model)
    assert_error_within(hidden(model), expected, exact)


@packs
def test_training_mode_packs_nothing() -> None:
    model = bf16_model("llama")
    accelerate(model)
    hidden(model.train())
    layers = [m for m in model.modules() if isinstance(m, PackedLinear)]
    assert layers
    assert not any(m._packed.is_made for m in layers)
    hidden(model.eval())
    assert all(m._packed.is_made for m in layers)


def overwritten(model: nn.Module) -> None:
    for weight in model.parameters():
        weight.data.copy_(weight.data.flip(0))


def merged(model: nn.Module) -> None:
    """As peft does: ``weight.data += delta``, which counts as no change."""
    for weight in model.parameters():
        weight.data += 0.05


def trained(model: nn.Module) -> None:
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    optimiser.step()


@pytest.mark.parametrize("change", [overwritten, merged, trained])
def test_packed_weights_follow_changes_that_leave_no_trace(change: Callable[[nn.Module], None]) -> None:
    model = bf16_model("llama")
    accelerate(model)
    before = hidden(model)
    change(model)
    after = hidden(model)
    accelerate(model)  # packs anew
    assert torch.equal(after, hidden(model))
    assert not torch.equal(after, before)


@packs
def test_packing_does_not_depend_on_the_memory_that_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    def left(total: int, available: int) -> dict[str, str]:
        memory = SimpleNamespace(total=total, available=available)
        monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
        return accelerate(bf16_model("llama")).left

    assert "linear" not in left(total=1 << 40, available=1 << 10)
    assert "a quarter of the 0 MiB of memory" in left(total=1 << 10, available=1 << 40)["linear"]


@packs
def test_a_weight_that_cannot_be_packed_runs_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = bf16_model("llama")
    expected = hidden(model)

    def no_memory(weight: torch.Tensor) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("llm2vec_fast.acceleration.packing.pack_weight", no_memory)
    accelerate(model, norm=False, rotary=False, swiglu=False)
    assert torch.equal(hidden(model), expected)
    assert "is not packed and runs slower" in caplog.text


def test_float32_products_are_left_alone_with_a_reason() -> None:
    report = accelerate(make_bidirectional(tiny_model("llama")))
    assert "linear" not in report.swapped
    assert "float32" in report.left["linear"]
    assert "float32" in str(report)


def test_a_norm_that_computes_something_else_is_left_alone() -> None:
    class ShiftedRMSNorm(type(tiny_model("llama").norm)):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1

    model = bf16_model("llama")
    model.norm.__class__ = ShiftedRMSNorm
    assert "something else" in accelerate(model).left["ShiftedRMSNorm"]
    assert type(model.norm) is ShiftedRMSNorm


def test_an_interleaved_rotary_embedding_is_left_alone() -> None:
    config = CONFIG_MAPPING["cohere"](**SHAPE)
    model = make_bidirectional(AutoModel.from_config(config)).bfloat16()
    exact, stock = hidden(copy.deepcopy(model).double()), hidden(model)
    assert "another way" in accelerate(model).left["CohereAttention"]
    assert_error_within(hidden(model), stock, exact)


def test_a_model_without_what_could_be_swapped_says_so() -> None:
    model = AutoModel.from_config(CONFIG_MAPPING["gpt2"](n_embd=32, n_layer=1, n_head=2, vocab_size=50))
    report = accelerate(model, attention=False)
    assert all("no module here" in report.left[part] for part in ("norm", "rotary", "swiglu"))


def test_an_mlp_that_computes_something_else_is_left_alone() -> None:
    class Shifted(nn.Module):
        def __init__(self, mlp: nn.Module) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
            self.act_fn = mlp.act_fn

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * (self.up_proj(x) + 1))

    model = bf16_model("llama")
    for layer in model.layers:
        layer.mlp = Shifted(layer.mlp)
    exact, stock = hidden(copy.deepcopy(model).double()), hidden(model)
    report = accelerate(model)
    assert "something else" in report.left["Shifted"]
    assert "swiglu" not in report.swapped
    assert_error_within(hidden(model), stock, exact)
