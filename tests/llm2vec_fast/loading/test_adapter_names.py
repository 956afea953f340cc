"""Adapters by every way to name layers, made on the decoder alone or under its head: as peft on the stock model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from reference_data import FOLDER, PUBLISHED_BOUND
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from llm2vec_fast import LLM2Vec
from llm2vec_fast.errors import ModelLoadError

IDS = torch.tensor([[1, 7, 30, 200, 5, 41]])
BASE = FOLDER / "llama"
SUFFIXES = ["q_proj", "v_proj", "down_proj"]
# {layers} is model.layers under a head, and layers without one.
CONFIGURATIONS = {
    "alpha_pattern": {"alpha_pattern": {"{layers}.0.self_attn.q_proj": 64, "{layers}.2.mlp.down_proj": 1}},
    "alpha-regex": {"alpha_pattern": {r"{layers}.[12].self_attn.v_proj": 40, "q_proj": 3}},
    "rank_pattern": {"rank_pattern": {"{layers}.0.self_attn.q_proj": 8, "{layers}.1.mlp.down_proj": 1}},
    "both-patterns-rslora": {
        "rank_pattern": {"{layers}.1.self_attn.v_proj": 6},
        "alpha_pattern": {"{layers}.1.self_attn.v_proj": 5},
        "use_rslora": True,
    },
    "full-names": {"target_modules": ["{layers}.0.self_attn.q_proj", "{layers}.2.mlp.up_proj"]},
    "full-and-short-names": {"target_modules": ["{layers}.0.self_attn.q_proj", "down_proj"]},
    "regex": {"target_modules": r"{layers}\.[02]\.self_attn\.(q|k)_proj"},
    "regex-anywhere": {"target_modules": r".*\.1\..*_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "exclude-full": {"exclude_modules": ["{layers}.1.self_attn.q_proj"]},
    "exclude-regex": {"exclude_modules": r"{layers}\.[01]\..*"},
    "layers": {"layers_to_transform": [0, 2], "layers_pattern": "layers"},
    "one-layer": {"layers_to_transform": 1, "layers_pattern": ["layers"]},
    "dora": {"use_dora": True, "alpha_pattern": {"{layers}.0.self_attn.q_proj": 64}},
    "lora_bias": {"target_modules": ["q_proj"], "lora_bias": True, "rank_pattern": {"{layers}.0.self_attn.q_proj": 2}},
    "modules_to_save": {"modules_to_save": ["embed_tokens"], "alpha_pattern": {"{layers}.0.self_attn.q_proj": 64}},
    "modules_to_save-full": {"modules_to_save": ["{model}embed_tokens"]},
    "trainable-tokens": {"trainable_token_indices": [7, 30]},
    "trainable-tokens-named": {"trainable_token_indices": {"embed_tokens": [7, 200]}},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"], "rank_pattern": {"{layers}.0.self_attn.q_proj": 2}},
    "target_parameters": {"target_modules": ["q_proj"], "target_parameters": ["mlp.down_proj.weight"]},
    "init-eva": {"init_lora_weights": "eva"},
    "init-orthogonal": {"init_lora_weights": "orthogonal"},
}


# The default of a widespread trainer: either part of this names layers, the second by their full names.
UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|v_proj))|"
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|mlp)\.(?:(?:q_proj|v_proj)))"
)


def _filled(value, headed: bool):
    """A configuration's value with its names as they are under a head, or without one."""
    if isinstance(value, str):
        return value.replace("{layers}", "model.layers" if headed else "layers").replace(
            "{model}", "model." if headed else ""
        )
    if isinstance(value, dict):
        return {_filled(key, headed): _filled(item, headed) for key, item in value.items()}
    return [_filled(item, headed) for item in value] if isinstance(value, list) else value


def make_adapter(folder: Path, *, headed: bool, embeddings: bool = False, **settings) -> torch.Tensor:
    """Save an adapter of stock peft on the stock model, and return the last hidden state of `IDS` by stock peft."""
    torch.manual_seed(3)
    stock = (AutoModelForCausalLM if headed else AutoModel).from_pretrained(BASE, attn_implementation="eager")
    given = {"r": 4, "lora_alpha": 8, "target_modules": SUFFIXES, **_filled(settings, headed)}
    wrapped = get_peft_model(stock, LoraConfig(task_type="CAUSAL_LM" if headed else None, **given))
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if weight.requires_grad and "magnitude" not in name:
                weight.add_(torch.randn_like(weight) * (1.0 if "embed" in name or "token" in name else 0.1))
    wrapped.save_pretrained(folder, save_embedding_layers=True if embeddings else "auto")
    again = PeftModel.from_pretrained(
        (AutoModelForCausalLM if headed else AutoModel).from_pretrained(BASE, attn_implementation="eager"), folder
    ).eval()
    with torch.no_grad():
        return again(IDS, output_hidden_states=True, use_cache=False).hidden_states[-1]


def hidden(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        out = model(input_ids=IDS, output_hidden_states=False)
    return out.last_hidden_state


def load(*sources, **options) -> LLM2Vec:
    options = {"dtype": "float32", "device": "cpu", "enable_bidirectional": False, **options}
    return LLM2Vec.from_pretrained(*sources, **options)


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert float((ours - theirs).abs().max()) <= PUBLISHED_BOUND * max(1.0, float(theirs.abs().max()))


@pytest.fixture(scope="module")
def plain() -> torch.Tensor:
    return hidden(load(BASE).model)


@pytest.mark.parametrize("headed", [False, True], ids=["decoder", "head"])
@pytest.mark.parametrize("kind", CONFIGURATIONS)
def test_an_adapter_does_what_it_does_in_peft_on_the_stock_model(tmp_path, plain, kind, headed):
    expected = make_adapter(tmp_path, headed=headed, **CONFIGURATIONS[kind])
    assert float((expected - plain).abs().max()) > 0.01  # it does something
    assert_same(hidden(load(BASE, tmp_path).model), expected)
    if kind != "lora_bias":  # there is no bias in this base to merge one into
        assert_same(hidden(load(BASE, tmp_path, merge_peft=True).model), expected)


def test_an_adapter_that_cannot_be_merged_is_refused(tmp_path):
    make_adapter(tmp_path, headed=False, **CONFIGURATIONS["lora_bias"])
    with pytest.raises(ModelLoadError, match="cannot be merged into LlamaModel"):
        load(BASE, tmp_path, merge_peft=True)


def test_names_without_a_common_pattern_are_those_that_an_adapter_has(tmp_path):
    """Names of the head's style in the configuration, the decoder's own in the weights: what can be told is done."""
    expected = make_adapter(tmp_path, headed=True, target_modules=["{layers}.0.self_attn.q_proj", "down_proj"])
    strip_head(tmp_path)
    assert_same(hidden(load(BASE, tmp_path).model), expected)


def test_a_pattern_whose_layers_cannot_be_told_is_refused(tmp_path):
    make_adapter(tmp_path, headed=True, alpha_pattern={"{layers}.0.self_attn.q_proj": 64})
    strip_head(tmp_path)
    with pytest.raises(ModelLoadError, match=r"alpha_pattern for model\.layers\.0\.self_attn\.q_proj"):
        load(BASE, tmp_path)


def test_a_pattern_of_a_model_around_the_decoder_is_refused_too(tmp_path):
    make_adapter(tmp_path, headed=False, alpha_pattern={"{layers}.0.self_attn.q_proj": 64})
    edit(tmp_path, alpha_pattern={"model.language_model.layers.0.self_attn.q_proj": 64})
    with pytest.raises(ModelLoadError, match=r"alpha_pattern for model\.language_model\.layers\.0"):
        load(BASE, tmp_path)


def test_a_pattern_for_a_layer_that_is_not_adapted_is_of_no_effect(tmp_path):
    expected = make_adapter(
        tmp_path, headed=True, layers_to_transform=[1], alpha_pattern={"{layers}.0.self_attn.q_proj": 64}
    )
    assert_same(hidden(load(BASE, tmp_path).model), expected)


@pytest.mark.parametrize("kind", ["unsloth", "inside-a-larger-model", "embeddings-along"])
def test_adapters_as_others_make_them(tmp_path, kind):
    settings = {"unsloth": {"target_modules": UNSLOTH}}.get(
        kind, {"alpha_pattern": {"{layers}.0.self_attn.q_proj": 64}}
    )
    expected = make_adapter(tmp_path, headed=True, embeddings=kind == "embeddings-along", **settings)
    if kind == "inside-a-larger-model":
        weights = load_file(tmp_path / "adapter_model.safetensors")
        inside = {key.replace("model.layers", "model.language_model.layers"): value for key, value in weights.items()}
        save_file(inside, tmp_path / "adapter_model.safetensors")
        edit(tmp_path, alpha_pattern={"model.language_model.layers.0.self_attn.q_proj": 64})
    assert_same(hidden(load(BASE, tmp_path).model), expected)


def test_an_embedding_of_another_size_in_an_adapter_is_said(tmp_path):
    make_adapter(tmp_path, headed=True, embeddings=True)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    table = "base_model.model.model.embed_tokens.weight"
    save_file({**weights, table: torch.ones(390, 64)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ModelLoadError, match="comes with an embedding of 390 tokens and this base has 384"):
        load(BASE, tmp_path)


def strip_head(folder: Path) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    renamed = {key.replace("base_model.model.model.", "base_model.model."): value for key, value in weights.items()}
    save_file(renamed, folder / "adapter_model.safetensors")


def edit(folder: Path, **changes) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "of type IA3 and only LORA is read"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa', which changes the base's weights"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base's weights"),
        ({"init_lora_weights": "olora"}, "changes the base's weights"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "changes the base's weights"),
        ({"alora_invocation_tokens": [5]}, r"alora_invocation_tokens=\[5\], which is not computed here"),
        ({"velora_config": {"num_groups": 4}}, "velora_config"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
        ({"megatron_config": {"a": 1}}, "megatron_config"),
        ({"some_setting_of_next_year": True}, "some_setting_of_next_year=True, which is not computed here"),
        ({"r": "8"}, "r='8' in its configuration: that is damaged"),
        ({"rank_pattern": {"q_proj": "2"}}, "rank_pattern"),
        ({"target_modules": {"q_proj": 1}}, "target_modules"),
        ({"target_modules": "("}, "does not fit this base"),
        ({"target_modules": ["q_proj"]}, "layers are in its weights or in its configuration alone"),
        ({"use_dora": True}, "have no counterpart"),
        ({"modules_to_save": ["norm"]}, "have no counterpart"),
    ],
)
def test_what_cannot_be_honoured_is_refused(tmp_path, changes, message):
    make_adapter(tmp_path, headed=False)
    edit(tmp_path, **changes)
    with pytest.raises(ModelLoadError, match=message) as caught:
        load(BASE, tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"megatron_core": "os.path"},
        {"runtime_config": {"ephemeral_gpu_offload": True}},
        {"auto_mapping": {"base_model_class": ["x"], "parent_library": "os"}},
        {"loftq_config": {"loftq_bits": 4}},
        {"enable_lora": None, "merge_weights": False, "another": {}},
        {"rank_pattern": {r".*\.gate_up_proj": 32}},  # as peft writes it for experts, which a model need not have
    ],
)
def test_what_is_of_no_effect_stays_so(tmp_path, changes):
    expected = make_adapter(tmp_path, headed=False)
    edit(tmp_path, **changes)
    assert_same(hidden(load(BASE, tmp_path).model), expected)


def test_no_module_that_a_configuration_names_is_imported(tmp_path, monkeypatch):
    make_adapter(tmp_path / "adapter", headed=False)
    (tmp_path / "evil_core.py").write_text("raise SystemExit('code of a download ran')")
    monkeypatch.syspath_prepend(tmp_path)
    edit(tmp_path / "adapter", megatron_core="evil_core", megatron_config={"tensor_model_parallel_size": 1})
    with pytest.raises(ModelLoadError, match="megatron_config"):
        load(BASE, tmp_path / "adapter")
