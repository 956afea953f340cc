"""Decoders that cannot attend both ways here are refused at once, by name; those that can are tried and left alone."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from tiny_models import SHAPE, WINDOW, tiny_model
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedModel

from llm2vec_fast.bidirectional import UnsupportedModelError, make_bidirectional
from llm2vec_fast.kernels.layout import SequenceLayout

PUBLISHED_TOLERANCE = 1e-4
LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
    "moe_intermediate_size": 24, "n_group": 1, "topk_group": 1,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
SOME_THAT_WORK = {
    "latent-attention": ("deepseek_v3", LATENT),
    "experts": ("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 24, "sliding_window": None}),
    "words-for-a-direction": (
        "gemma4_unified_text",
        {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention", "full_attention"]},
    ),
    "learned-positions": ("gpt2", {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}),
    "window-beyond-the-context": (
        "phimoe",
        {"num_local_experts": 2, "sliding_window": SHAPE["max_position_embeddings"]},
    ),
    "encoder": ("bert", {}),
}
SOME_THAT_CANNOT = {
    "no-keywords": ("nemotron", {}, "NemotronModel .model type nemotron. "),
    "mask-of-its-own": ("doge", {}, "DogeModel .*DogeAttention makes a mask of its own"),
    "window-in-a-mask": (
        "phimoe", {"num_local_experts": 2, "sliding_window": WINDOW}, "PhimoeModel .* window of 5 tokens"
    ),
    "positions-from-2": ("roberta", {}, "RobertaModel .*counts positions in a way of its own"),
    "language-unset": ("xmod", {"languages": ["en_XX"]}, "XmodModel .*Input language unknown"),
}  # fmt: skip


def texts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, SHAPE["vocab_size"], (n,), generator=generator) for n in (11, 1, 7)]


def packed(model: nn.Module) -> list[Tensor]:
    lengths = [len(ids) for ids in texts()]
    layout = SequenceLayout.from_lengths(lengths)
    return list(model(input_ids=torch.cat(texts())[None], layout=layout).last_hidden_state[0].split(lengths))


@pytest.mark.parametrize("name", SOME_THAT_WORK)
def test_families_off_the_common_path_equal_stock_one_text_at_a_time(name: str) -> None:
    family, changes = SOME_THAT_WORK[name]
    if family not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    model, stock = make_bidirectional(tiny_model(family, **changes)), tiny_model(family, **changes)
    stock.config.is_causal = False
    with torch.no_grad():
        for ours, ids in zip(packed(model), texts(), strict=True):
            theirs = stock(input_ids=ids[None], use_cache=False).last_hidden_state[0]
            assert (ours - theirs).abs().max() <= PUBLISHED_TOLERANCE


@pytest.mark.parametrize("name", SOME_THAT_CANNOT)
def test_families_that_cannot_work_are_refused_by_name_and_left_as_they_were(name: str) -> None:
    family, changes, says = SOME_THAT_CANNOT[name]
    model = tiny_model(family, **changes)
    before = copy.deepcopy(model)
    with pytest.raises(UnsupportedModelError, match=says):
        make_bidirectional(model)
    assert model.config.to_dict() == before.config.to_dict()
    assert model.config._attn_implementation == "eager"
    assert not model._forward_pre_hooks


def test_an_encoder_is_not_made_causal() -> None:
    with pytest.raises(UnsupportedModelError, match=r"BertModel \(model type bert\) is an encoder"):
        make_bidirectional(tiny_model("bert"), enabled=False)


class Shift(nn.Module):
    """Mixes a token with the one before it, as token shift does: no attention, so no layout stops it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Tensor) -> Tensor:
        return self.inner(hidden + hidden.roll(1, dims=1))


class Causal:
    """A configuration that says causal whatever the decoder's says."""

    is_causal = True

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def __getattr__(self, name: str) -> object:
        return getattr(self.__dict__["_model"].config, name)


@pytest.mark.parametrize("layer", [0, 2])
def test_code_that_mixes_packed_texts_is_refused(layer: int) -> None:
    """Also where only a later layer does."""
    model = tiny_model("llama")
    model.layers[layer].mlp = Shift(model.layers[layer].mlp)
    with pytest.raises(UnsupportedModelError, match=r"LlamaModel .*lets a text see the texts packed beside it"):
        make_bidirectional(model)


def test_attention_that_does_not_follow_the_direction_is_refused() -> None:
    model = tiny_model("llama")
    for layer in model.layers:
        layer.self_attn.config = Causal(model)
    with pytest.raises(UnsupportedModelError, match=r"LlamaModel .*attends one way only"):
        make_bidirectional(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_trial_changes_nothing(dtype: torch.dtype) -> None:
    """Modes module by module, the random state, and every tensor."""
    model = tiny_model("qwen3_moe", attention_dropout=0.5, **EXPERTS).to(dtype).train()
    model.layers[1].eval()
    before, state = [m.training for m in model.modules()], torch.get_rng_state()
    tensors = copy.deepcopy(model.state_dict())
    make_bidirectional(model)
    assert [m.training for m in model.modules()] == before
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(x, tensors[name]) for name, x in model.state_dict().items())


def test_attention_that_adds_nothing_yet_is_not_taken_for_causal() -> None:
    """Some families start their output projections at zero."""
    model = tiny_model("llama")
    for layer in model.layers:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
    make_bidirectional(model)


def test_weights_that_are_not_there_yet_or_not_finite_are_not_held_against_a_model() -> None:
    make_bidirectional(tiny_model("llama").to("meta"))
    broken = tiny_model("llama")
    nn.init.constant_(broken.layers[0].mlp.up_proj.weight, float("nan"))
    make_bidirectional(broken)


def test_a_model_spread_by_device_map_is_tried_like_any_other() -> None:
    """Its hooks copy what they hand on to each layer, the layout, too."""

    def spread(model: nn.Module) -> nn.Module:
        add_hook_to_module(model, AlignDevicesHook(io_same_device=True))
        for part in (model.embed_tokens, model.rotary_emb, model.norm, *model.layers):
            add_hook_to_module(part, AlignDevicesHook(execution_device="cpu", io_same_device=True))
        return model

    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    plain, spread_out = (tiny_model("llama", rope_parameters=rope, max_position_embeddings=8) for _ in range(2))
    with torch.no_grad():
        for ours, theirs in zip(
            packed(make_bidirectional(spread(spread_out))), packed(make_bidirectional(plain)), strict=True
        ):
            assert torch.equal(ours, theirs)
    spread_out = spread(tiny_model("llama"))
    spread_out.layers[0].mlp = Shift(spread_out.layers[0].mlp)
    with pytest.raises(UnsupportedModelError, match="lets a text see the texts packed beside it"):
        make_bidirectional(spread_out)
