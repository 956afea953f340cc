"""What stages write is what stock peft and transformers load, for families that name their layers in many ways."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from reference_data import FOLDER
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM, AutoTokenizer

from llm2vec_fast import LLM2Vec
from llm2vec_fast.bidirectional import decoder_of, make_bidirectional
from llm2vec_fast.errors import UserError
from llm2vec_fast.loading import lowrank
from llm2vec_fast.training.arguments import MntpArguments
from llm2vec_fast.training.models import StageModel, load_model
from llm2vec_fast.training.written import adapter_of, require_loadable, whole_model

Settings = Callable[..., dict[str, object]]
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
SHAPE = {
    "vocab_size": 384, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3,
}  # fmt: skip
GPT = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "attn_pdrop": 0.0}
FAMILIES = {
    "llama": {},
    "gpt_neox": {},
    "gptj": {**GPT, "rotary_dim": 8},
    "codegen": {**GPT, "rotary_dim": 8},
    "gpt_bigcode": GPT,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi3": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "mlp_only_layers": [0]},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny model with its head, as a folder."""
    folder = tmp_path_factory.mktemp("bases")

    def bases(family: str) -> Path:
        if not (folder / family).exists():
            torch.manual_seed(0)
            config = CONFIG_MAPPING[family](**{**SHAPE, **FAMILIES[family]})
            AutoModelForCausalLM.from_config(config).save_pretrained(folder / family)
            AutoTokenizer.from_pretrained(FOLDER / "llama").save_pretrained(folder / family)
        return folder / family

    return bases


@pytest.fixture
def staged(settings: Settings, bases: Callable[[str], Path]) -> Callable[..., StageModel]:
    """What a stage trains, as it is when trained: every trained weight moved, at random."""

    def staged(family: str, head: bool, **changes: object) -> StageModel:
        given = settings(**{"model_name_or_path": str(bases(family)), "lora_dropout": 0.0, **changes})
        stage = load_model(MntpArguments(**given), head=head)
        torch.manual_seed(2)
        with torch.no_grad():
            for parameter in stage.model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        stage.model.eval()
        return stage

    return staged


def saved(stage: StageModel, folder: Path) -> Path:
    folder.mkdir()
    config, weights = adapter_of(stage.model, stage.merged)
    save_file(weights, folder / "adapter_model.safetensors")
    config.save_pretrained(str(folder))
    return folder


def hidden(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return decoder_of(model)(input_ids=IDS).last_hidden_state


def assert_loads(stage: StageModel, base: Path, adapter: Path) -> None:
    """In stock peft, on what AutoModel loads, and in `LLM2Vec`: with the output of what was trained."""
    stock = PeftModel.from_pretrained(AutoModel.from_pretrained(base), adapter).eval()
    expected = hidden(stage.model)
    bare = hidden(make_bidirectional(AutoModel.from_pretrained(base).eval()))
    assert float((bare - expected).abs().max()) > 0.1
    torch.testing.assert_close(hidden(make_bidirectional(stock)), expected, rtol=1e-4, atol=1e-4)
    encoder = LLM2Vec.from_pretrained(base, adapter, dtype="float32", device="cpu")
    torch.testing.assert_close(hidden(encoder.model), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "head"), [*((family, True) for family in FAMILIES), ("gpt_neox", False), ("opt", False)]
)
def test_an_adapter(staged: Callable, bases: Callable, tmp_path: Path, family: str, head: bool) -> None:
    stage = staged(family, head)
    assert_loads(stage, bases(family), saved(stage, tmp_path / "adapter"))


@pytest.mark.parametrize("family", ["gpt_neox", "opt"])
def test_an_adapter_joined_with_an_earlier_one(staged: Callable, bases: Callable, tmp_path: Path, family: str) -> None:
    first = saved(staged(family, True), tmp_path / "first")
    second = staged(family, False, peft_model_name_or_path=[str(first)])
    third = saved(second, tmp_path / "second")
    assert_loads(second, bases(family), third)
    continued = staged(family, True, peft_model_name_or_path=[str(first), str(third)], continue_adapter=True)
    assert_loads(continued, bases(family), saved(continued, tmp_path / "third"))


CONFIGURATIONS = {
    "whole-names": {"target_modules": ["model.layers.0.self_attn.q_proj", "model.layers.2.mlp.up_proj"]},
    "regex": {"target_modules": r"model\.layers\.[02]\.self_attn\.(q|v)_proj"},
    "layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]},
    "layers-pattern": {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
    "rank-by-whole-name": {
        "target_modules": ["q_proj"],
        "rank_pattern": {"model.layers.0.self_attn.q_proj": 2},
        "alpha_pattern": {"model.layers.1.self_attn.q_proj": 40},
    },
    "excluded": {"target_modules": ["q_proj"], "exclude_modules": r"model\.layers\.1\..*"},
    "output-layer": {"target_modules": ["q_proj", "lm_head"]},
}


@pytest.mark.parametrize(
    ("kind", "below"), [*((kind, False) for kind in CONFIGURATIONS), ("regex", True), ("output-layer", True)]
)
def test_an_adapter_that_names_layers_as_those_under_a_head(
    staged: Callable, bases: Callable, tmp_path: Path, kind: str, below: bool
) -> None:
    """Trained on under the head, and written for the decoder alone, where these names are others."""
    torch.manual_seed(3)
    made = get_peft_model(
        AutoModelForCausalLM.from_pretrained(bases("llama")),
        LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **CONFIGURATIONS[kind]),
    )
    made.save_pretrained(tmp_path / "given")
    first = [str(saved(staged("llama", True), tmp_path / "first"))] if below else []
    stage = staged("llama", True, peft_model_name_or_path=[*first, str(tmp_path / "given")], continue_adapter=True)
    layers = {name for name, x in stage.model.named_modules() if name.endswith("lora_A")}
    assert len(layers) == sum(name.endswith("lora_A") for name, _ in made.named_modules())
    assert_loads(stage, bases("llama"), saved(stage, tmp_path / "adapter"))


@pytest.mark.parametrize(("family", "head"), [("llama", True), ("gpt_neox", True), ("opt", True), ("opt", False)])
def test_all_weights(staged: Callable, tmp_path: Path, family: str, head: bool) -> None:
    stage = staged(family, head, lora_r=0)
    model, weights = whole_model(stage.model, stage.model.state_dict())
    model.save_pretrained(tmp_path / "whole", state_dict=weights)
    stage.tokenizer.save_pretrained(tmp_path / "whole")
    expected = hidden(stage.model)
    stock = AutoModel.from_pretrained(tmp_path / "whole").eval()
    torch.testing.assert_close(hidden(make_bidirectional(stock)), expected, rtol=1e-4, atol=1e-4)
    encoder = LLM2Vec.from_pretrained(tmp_path / "whole", dtype="float32", device="cpu")
    torch.testing.assert_close(hidden(encoder.model), expected, rtol=1e-4, atol=1e-4)


def test_experts_cannot_be_joined_and_what_is_left_of_them_is_told(
    staged: Callable, bases: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of experts with one weight for all, peft adapts that, whatever layers are named."""
    with caplog.at_level(logging.INFO, logger="llm2vec_fast"):
        experts = staged("qwen3_moe", True)
    assert "leaves model.layers.0.mlp.gate_proj and 2 other linear layers as they are" in caplog.text
    attention = staged("qwen3_moe", True, lora_target_modules=["q_proj", "v_proj"])
    first, second = saved(attention, tmp_path / "attention"), saved(experts, tmp_path / "experts")
    with pytest.raises(UserError, match=r"on the parameters of layers\.1\.mlp\.experts cannot be joined"):
        staged("qwen3_moe", True, peft_model_name_or_path=[str(first)])
    with pytest.raises(UserError, match=r"target_parameters=.* cannot be joined with another"):
        staged("qwen3_moe", True, peft_model_name_or_path=[str(second)], lora_target_modules=["q_proj"])
    both = staged("qwen3_moe", True, peft_model_name_or_path=[str(first)], lora_target_modules=["q_proj"])
    assert_loads(both, bases("qwen3_moe"), saved(both, tmp_path / "both"))


def test_what_could_not_be_loaded_is_not_trained(staged: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first step: the adapter is put together as it will be and put on an empty model."""
    stock = lowrank._targets
    monkeypatch.setattr(lowrank, "_targets", lambda layers, body: [f"model.{name}" for name in stock(layers, body)])
    with pytest.raises(UserError, match="the adapter to be trained does not fit this base"):
        staged("llama", True, saved_rank=4)


def test_looking_ahead_draws_nothing(staged: Callable) -> None:
    stage = staged("llama", True)
    before = torch.get_rng_state()
    require_loadable(stage.model, stage.merged)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_adapter_names_its_base_from_anywhere(
    staged: Callable, bases: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bases("llama").parent)
    stage = staged("llama", True, model_name_or_path="llama")
    adapter = saved(stage, tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    encoder = LLM2Vec.from_pretrained(adapter, dtype="float32", device="cpu")
    torch.testing.assert_close(hidden(encoder.model), hidden(stage.model), rtol=1e-4, atol=1e-4)
    named = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == stage.model.active_peft_config.base_model_name_or_path  # which checkpoints have
    assert Path(named).is_absolute()
