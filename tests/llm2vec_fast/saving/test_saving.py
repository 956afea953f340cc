"""What `save` writes: whole or not at all, for plain transformers and for loading again."""

from __future__ import annotations

import json

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from reference_data import FOLDER, INPUTS, PUBLISHED_BOUND, TEXTS
from safetensors.torch import save_file
from transformers import AutoModel

from llm2vec_fast import LLM2Vec
from llm2vec_fast.saving import SaveError, written_beside


def load(base, *adapter, **settings) -> LLM2Vec:
    return LLM2Vec.from_pretrained(base, *adapter, **{"dtype": "float32", "device": "cpu", **settings})


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max()) <= PUBLISHED_BOUND


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("bidirectional", [True, False], ids=["bi", "causal"])
def test_plain_transformers_computes_the_same_hidden_states(tmp_path, attention, bidirectional):
    encoder = load(FOLDER / "mistral", enable_bidirectional=bidirectional)
    encoder.encode(TEXTS)
    encoder.save(tmp_path / "model")
    stock = AutoModel.from_pretrained(tmp_path / "model", attn_implementation=attention)
    features = encoder.tokenize(TEXTS)
    mask = features["attention_mask"]
    with torch.no_grad():
        theirs = stock(features["input_ids"], attention_mask=mask).last_hidden_state
        ours = encoder.model(features["input_ids"], attention_mask=mask).last_hidden_state
    assert_close(ours[mask.bool()], theirs[mask.bool()])
    assert_close(encoder.encode(TEXTS), load(tmp_path / "model", enable_bidirectional=bidirectional).encode(TEXTS))


def test_a_bidirectional_folder_can_be_loaded_causal(tmp_path):
    load(FOLDER / "llama").save(tmp_path / "model")
    causal = load(tmp_path / "model", enable_bidirectional=False)
    assert_close(causal.encode(TEXTS), load(FOLDER / "llama", enable_bidirectional=False).encode(TEXTS))


def test_settings_come_back_and_can_be_overruled(tmp_path):
    settings = {"pooling_mode": "weighted_mean", "max_length": 100, "doc_max_length": 60, "skip_instruction": False}
    load(FOLDER / "llama", **settings).save(tmp_path / "model")
    again = load(tmp_path / "model")
    assert {name: getattr(again, name) for name in settings} == settings
    assert json.loads((tmp_path / "model" / "llm2vec_config.json").read_text()) == settings
    assert load(tmp_path / "model", pooling_mode="mean").pooling_mode == "mean"
    load(FOLDER / "llama", **settings).save(tmp_path / "bare", save_config=False)
    assert load(tmp_path / "bare").pooling_mode == "mean"


def test_the_checkpoint_keeps_its_template(tmp_path):
    encoder = load(FOLDER / "llama")
    encoder.checkpoint = "meta-llama/Llama-2-7b-chat-hf"
    encoder.save(tmp_path / "model")
    again = load(tmp_path / "model")
    assert torch.equal(again.tokenize(TEXTS)["input_ids"], encoder.tokenize(TEXTS)["input_ids"])
    assert encoder.checkpoint in (tmp_path / "model" / "config.json").read_text()
    assert not torch.equal(again.tokenize(TEXTS)["input_ids"], load(FOLDER / "llama").tokenize(TEXTS)["input_ids"])


def test_no_path_of_this_machine_is_saved(tmp_path):
    load(FOLDER / "llama").save(tmp_path / "model")
    for path in (tmp_path / "model").glob("*.json"):
        assert str(FOLDER) not in path.read_text()


def test_an_adapter_is_saved_alone_and_knows_its_base(tmp_path):
    encoder = load(FOLDER / "llama", FOLDER / "llama-lora", pooling_mode="last_token")
    encoder.save(tmp_path / "adapter")
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "llm2vec_config.json", "tokenizer.json"} <= names
    assert "model.safetensors" not in names
    expected = encoder.encode(INPUTS["instr"])
    assert_close(load(tmp_path / "adapter").encode(INPUTS["instr"]), expected)
    assert_close(load(FOLDER / "llama", tmp_path / "adapter").encode(INPUTS["instr"]), expected)


def test_merging_before_saving_leaves_an_ordinary_model(tmp_path):
    encoder = load(FOLDER / "llama", FOLDER / "llama-lora")
    expected = encoder.encode(TEXTS)
    encoder.save(tmp_path / "model", merge_before_save=True)
    assert_close(load(tmp_path / "model").encode(TEXTS), expected)
    assert_close(encoder.encode(TEXTS), expected)
    assert not (tmp_path / "model" / "adapter_config.json").exists()


def test_an_existing_folder_keeps_other_files_and_loses_old_weights(tmp_path):
    encoder = load(FOLDER / "llama", FOLDER / "llama-lora")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "notes.txt").write_text("mine")
    encoder.save(tmp_path / "model")
    encoder.save(tmp_path / "model", merge_before_save=True)
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert "notes.txt" in names
    assert not {name for name in names if name.startswith("adapter")}
    assert_close(load(tmp_path / "model").encode(TEXTS), encoder.encode(TEXTS))


def test_a_failed_save_changes_nothing(tmp_path, monkeypatch):
    encoder = load(FOLDER / "llama")
    encoder.save(tmp_path / "model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    monkeypatch.setattr(encoder.tokenizer, "save_pretrained", lambda _: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        encoder.save(tmp_path / "model")
    with pytest.raises(OSError, match="full"):
        encoder.save(tmp_path / "other")
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_new_folder_has_ordinary_permissions(tmp_path):
    (tmp_path / "by_hand").mkdir()
    with written_beside(tmp_path / "parents" / "made") as folder:
        (folder / "file").write_text("x")
    assert (tmp_path / "parents" / "made").stat().st_mode == (tmp_path / "by_hand").stat().st_mode
    assert [path.name for path in (tmp_path / "parents").iterdir()] == ["made"]


@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
def test_saved_files_have_ordinary_permissions(tmp_path, existing):
    target, by_hand = tmp_path / "out", tmp_path / "by_hand"
    by_hand.touch()
    if existing:
        target.mkdir()
    with written_beside(target) as folder:
        save_file({"x": torch.ones(1)}, folder / "weights.safetensors")
    assert (target / "weights.safetensors").stat().st_mode == by_hand.stat().st_mode


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[5]), r"asks for alora_invocation_tokens=\[5\]"),
        (LoraConfig(target_modules=["q_proj"], use_qalora=True, qalora_group_size=4), "asks for use_qalora=True"),
        (IA3Config(target_modules=["v_proj"], feedforward_modules=[]), "is of type IA3"),
    ],
    ids=["alora", "qalora", "ia3"],
)
def test_an_adapter_of_a_kind_that_is_not_read_is_not_written(tmp_path, config, told):
    encoder = load(FOLDER / "llama")
    encoder.model = get_peft_model(encoder.model, config)
    with pytest.raises(SaveError, match=f"the adapter default {told}.* could not be loaded again: save"):
        encoder.save(tmp_path / "model")


def test_an_adapter_that_peft_put_on_the_encoder_comes_back(tmp_path):
    encoder = load(FOLDER / "llama")
    wrapped = get_peft_model(encoder, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    expected = encoder.encode(TEXTS)
    assert float((expected - load(FOLDER / "llama").encode(TEXTS)).abs().max()) > 0.01
    encoder.save(tmp_path / "saved")
    wrapped.save_pretrained(tmp_path / "peft")
    for name in ("saved", "peft"):
        assert_close(load(FOLDER / "llama", tmp_path / name).encode(TEXTS), expected)


def test_embeddings_under_trained_tokens_are_compared_with_the_base(tmp_path):
    encoder = load(FOLDER / "llama")
    config = LoraConfig(target_modules=["q_proj"], trainable_token_indices=[5], init_lora_weights=False)
    encoder.model = get_peft_model(encoder.model, config).eval()
    expected = encoder.encode(TEXTS)
    encoder.save(tmp_path / "model")
    assert_close(load(FOLDER / "llama", tmp_path / "model").encode(TEXTS), expected)
    with torch.no_grad():
        encoder.model.get_base_model().embed_tokens.token_adapter.base_layer.weight[9] += 1
    with pytest.raises(SaveError, match=r"embed_tokens\.weight differs"):
        encoder.save(tmp_path / "other")
