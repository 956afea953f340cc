"""Which layers of a decoder an adapter is put on."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_hub import commit_of, fill_cache
from huggingface_hub import constants
from peft import PeftModel
from reference_data import FOLDER
from transformers import AutoTokenizer, Phi3Config, Phi3ForCausalLM

from llm2vec_fast.bidirectional import decoder_of
from llm2vec_fast.errors import UserError
from llm2vec_fast.loading import origin_of
from llm2vec_fast.training.arguments import LORA_TARGETS, MntpArguments
from llm2vec_fast.training.models import load_model

Settings = Callable[..., dict[str, object]]
FUSED = {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}


@pytest.fixture
def phi(tmp_path: Path) -> str:
    """A decoder whose projections are fused, as a folder."""
    folder = tmp_path / "phi"
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    Phi3ForCausalLM(Phi3Config(vocab_size=384, pad_token_id=0, **sizes)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(FOLDER / "llama").save_pretrained(folder)
    return str(folder)


def adapted(model: PeftModel) -> set[str]:
    names = {name.split(".lora_A")[0] for name, _ in model.named_modules() if name.endswith("lora_A.default")}
    return {name.rsplit(".", 1)[-1] for name in names}


@pytest.mark.parametrize("head", [False, True])
def test_where_default_names_are_missing_all_linear_layers_are_adapted(
    settings: Settings, phi: str, head: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="llm2vec_fast"):
        stage = load_model(MntpArguments(**settings(model_name_or_path=phi)), head=head)
    assert adapted(stage.model) == FUSED
    assert "adapts down_proj, gate_up_proj, o_proj, qkv_proj" in caplog.text


@pytest.mark.parametrize("head", [False, True])
def test_a_llama_is_adapted_where_the_paper_says(settings: Settings, head: bool, tmp_path: Path) -> None:
    stage = load_model(MntpArguments(**settings()), head=head)
    assert adapted(stage.model) == set(LORA_TARGETS)
    stage.model.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == sorted(LORA_TARGETS)


@pytest.mark.parametrize("head", [False, True])
def test_all_linear_is_pefts(settings: Settings, phi: str, head: bool) -> None:
    given = settings(model_name_or_path=phi, lora_target_modules=["all-linear"])
    assert adapted(load_model(MntpArguments(**given), head=head).model) == FUSED


@pytest.mark.parametrize("earlier", [[], [str(FOLDER / "llama-lora")]], ids=["none", "merged"])
def test_all_weights_are_trained_where_there_is_no_adapter(settings: Settings, earlier: list[str]) -> None:
    """peft freezes what it puts an adapter on, and leaves it so after merging."""
    stage = load_model(MntpArguments(**settings(lora_r=0, peft_model_name_or_path=earlier)), head=True)
    assert all(x.requires_grad for x in stage.model.parameters())
    adapted = load_model(MntpArguments(**settings(peft_model_name_or_path=earlier)), head=True).model
    assert {name.split(".")[-3] for name, x in adapted.named_parameters() if x.requires_grad} == {"lora_A", "lora_B"}


def test_one_layer_may_be_named_whole(settings: Settings) -> None:
    given = settings(lora_target_modules=["layers.0.self_attn.q_proj", "o_proj"])
    assert adapted(load_model(MntpArguments(**given), head=True).model) == {"q_proj", "o_proj"}


@pytest.mark.parametrize("names", [["o_proj", "q_proj"], ["o_proj", "all-linear"], ["proj"]])
def test_a_name_of_no_layer_is_refused(settings: Settings, phi: str, names: list[str]) -> None:
    given = MntpArguments(**settings(model_name_or_path=phi, lora_target_modules=names))
    message = (
        f"lora_target_modules={' '.join(names)} does not fit Phi3ForCausalLM: it has no layer {names[-1]}, but "
        "down_proj, gate_up_proj, o_proj, qkv_proj"
    )
    with pytest.raises(UserError, match=message) as caught:
        load_model(given, head=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"peft_model_name_or_path": ["output/mntp/llama"]},
            "peft_model_name_or_path=output/mntp/llama does not exist",
        ),
        ({"fsdp": True}, "fsdp needs several processes: start with torchrun"),
    ],
    ids=["adapter", "fsdp"],
)
def test_what_cannot_be_trained_is_told_before_the_model_is_read(
    settings: Settings, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load_model(MntpArguments(**settings(model_name_or_path="nowhere", **changes)), head=True)


def test_a_revision_of_the_decoder_is_what_is_trained_and_what_the_adapter_names(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    fill_cache(tmp_path / "cache", "org/model", FOLDER / "mistral")
    fill_cache(tmp_path / "cache", "org/model", FOLDER / "llama", "v1")
    stage = load_model(MntpArguments(**settings(model_name_or_path="org/model", model_revision="v1")), head=True)
    assert decoder_of(stage.model).config.model_type == "llama"
    origin = origin_of(stage.model)
    assert (origin.decoder.name, origin.decoder.commit) == ("org/model", commit_of("org/model", "v1"))
