"""What `from_pretrained` takes, and what it refuses in one sentence."""

from __future__ import annotations

import importlib.util
import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from reference_data import COUNTED_RIGHT, FOLDER, INPUTS, TEXTS, arrays, assert_matches
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llm2vec_fast import LLM2Vec
from llm2vec_fast.bidirectional import UnsupportedModelError
from llm2vec_fast.errors import ModelLoadError


def load(base, *adapter, **settings) -> LLM2Vec:
    return LLM2Vec.from_pretrained(base, *adapter, **{"dtype": "float32", "device": "cpu", **settings})


@pytest.fixture
def model(tmp_path) -> Path:
    return Path(shutil.copytree(FOLDER / "llama", tmp_path / "model"))


@pytest.fixture
def adapter(tmp_path) -> Path:
    return Path(shutil.copytree(FOLDER / "llama-lora", tmp_path / "adapter"))


def rename_keys(folder: Path, old: str, new: str) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({key.replace(old, new): value for key, value in weights.items()}, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("merge", [False, True], ids=["separate", "merged"])
def test_adapters_of_a_model_with_its_head(adapter, merge):
    """Today's peft saves base_model.model.model.layers, where the original's training scripts leave one level out."""
    rename_keys(adapter, "base_model.model.", "base_model.model.model.")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "task_type": "CAUSAL_LM"}))
    ours = load(FOLDER / "llama", adapter, merge_peft=merge).encode(INPUTS["instr"], convert_to_numpy=True)
    assert_matches(ours[COUNTED_RIGHT], arrays("llama")["emb|lora|merge0"][COUNTED_RIGHT])


def test_an_adapter_just_saved_by_peft(tmp_path):
    whole = AutoModelForCausalLM.from_pretrained(FOLDER / "llama")
    settings = LoraConfig(r=2, target_modules=["q_proj", "down_proj", "lm_head"], task_type="CAUSAL_LM")
    whole = get_peft_model(whole, settings)
    torch.manual_seed(0)
    for name, parameter in whole.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    whole.save_pretrained(tmp_path / "adapter")
    encoder = load(FOLDER / "llama", tmp_path / "adapter", enable_bidirectional=False)
    tokens = encoder.tokenize(TEXTS[:1])["input_ids"]
    with torch.no_grad():
        expected = whole(tokens, output_hidden_states=True).hidden_states[-1].mean(1)
    assert_matches(encoder.encode(TEXTS[:1], convert_to_numpy=True), expected.numpy())


def test_an_adapter_on_top_of_an_adapter(adapter, tmp_path):
    """As published: the first, from MNTP, is merged; the second, from SimCSE, goes on top."""
    config = (adapter / "adapter_config.json").read_text()
    (adapter / "adapter_config.json").write_text(config.replace('"llama"', json.dumps(str(FOLDER / "llama"))))
    load(FOLDER / "llama", FOLDER / "llama-lora", merge_peft=True).save(tmp_path / "merged")
    ours = load(adapter, FOLDER / "llama-lora").encode(TEXTS, convert_to_numpy=True)
    assert_matches(ours, load(tmp_path / "merged", FOLDER / "llama-lora").encode(TEXTS, convert_to_numpy=True))


def test_an_adapter_is_frozen_whatever_it_was_saved_as(adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "inference_mode": False}))
    parameters = dict(load(FOLDER / "llama", adapter).named_parameters())
    assert any("lora_" in name for name in parameters)
    assert not any(p.requires_grad for name, p in parameters.items() if "lora_" in name)


def test_a_pickle_is_not_read_because_another_file_is_there(model):
    weights = load_file(model / "model.safetensors")
    torch.save(weights, model / "pytorch_model.bin")
    (model / "model.safetensors").rename(model / "other.safetensors")
    with pytest.raises(ModelLoadError, match="cannot be loaded"):
        load(model)


def test_gguf(tmp_path):
    gguf = pytest.importorskip("gguf")
    assert gguf
    from tiny_gguf import write_gguf

    write_gguf(FOLDER / "llama", tmp_path / "tiny.gguf")
    encoder, plain = load(tmp_path / "tiny.gguf"), load(FOLDER / "llama")
    features = plain.tokenize(TEXTS)
    with torch.no_grad():
        assert_matches(encoder(features).numpy(), plain(features).numpy())
    assert encoder.encode(TEXTS).shape == (5, 64)
    encoder.save(tmp_path / "saved")
    assert_matches(load(tmp_path / "saved").encode(TEXTS).numpy(), encoder.encode(TEXTS).numpy())


def test_gguf_without_its_package(tmp_path, monkeypatch):
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "gguf" else find(name, *a))
    with pytest.raises(ModelLoadError, match=r"needs the package gguf: pip install 'llm2vec-fast\[gguf\]'"):
        load(tmp_path / "tiny.gguf")


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + bytes(100), b"no such format" * 50])
def test_a_damaged_gguf_file(tmp_path, content):
    (tmp_path / "tiny.gguf").write_bytes(content)
    with pytest.raises(ModelLoadError, match=r"tiny\.gguf cannot be loaded"):
        load(tmp_path / "tiny.gguf")


@pytest.mark.parametrize("name", ["a/b/c", "/nowhere/model", "./nowhere", "nowhere.gguf", "/nowhere/adapter"])
def test_what_does_not_exist(name):
    with pytest.raises(ModelLoadError, match=r"does not exist: check the path|neither a folder here nor the name"):
        load(name)


def test_other_spellings_of_dtype_and_device():
    assert load(FOLDER / "llama", torch_dtype=torch.bfloat16).dtype == torch.bfloat16
    assert load(FOLDER / "llama", device=None, device_map="cpu").device == torch.device("cpu")
    assert load(FOLDER / "llama", dtype="auto").dtype in (torch.bfloat16, torch.float32)


def test_loading_says_nothing(capfd):
    load(FOLDER / "llama", FOLDER / "llama-lora")
    assert capfd.readouterr() == ("", "")


def without(folder: Path, name: str) -> None:
    (folder / name).unlink()


def cut(folder: Path, name: str, size: int) -> None:
    (folder / name).write_bytes((folder / name).read_bytes()[:size])


def as_pickle(folder: Path, name: str, pickle: str) -> None:
    without(folder, name)
    (folder / pickle).write_bytes(b"a pickle would be here")


def without_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def of_another_shape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 32}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: without(f, "config.json"), "has no config.json"),
        (lambda f: cut(f, "config.json", 100), r"config\.json.*not.*valid JSON"),
        (lambda f: without(f, "model.safetensors"), r"has no weights: a \*\.safetensors file is expected"),
        (lambda f: cut(f, "model.safetensors", 5000), "cannot be loaded"),
        (lambda f: cut(f, "model.safetensors", 3), "cannot be loaded"),
        (lambda f: as_pickle(f, "model.safetensors", "pytorch_model.bin"), r"only as pickle \(pytorch_model\.bin\)"),
        (without_a_weight, r"no weights for 1 of its parameters \(layers\.1\.mlp\.up_proj\.weight"),
        (of_another_shape, "cannot be loaded"),
        (lambda f: cut(f, "tokenizer.json", 1000), "tokenizer of .* cannot be loaded"),
        (lambda f: (f / "llm2vec_config.json").write_text("[1]"), r"llm2vec_config\.json holds a list"),
        (lambda f: shutil.rmtree(f), "does not exist: check the path"),
    ],
)
def test_damaged_model_folders(model, damage, message):
    damage(model)
    with pytest.raises(ModelLoadError, match=message) as caught:
        load(model)
    assert str(model) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: without(f, "adapter_config.json"), "has no adapter_config.json"),
        (lambda f: without(f, "adapter_model.safetensors"), r"has no adapter_model\.safetensors"),
        (
            lambda f: as_pickle(f, "adapter_model.safetensors", "adapter_model.bin"),
            r"only as pickle \(adapter_model\.bin",
        ),
        (lambda f: cut(f, "adapter_model.safetensors", 900), "is damaged"),
        (lambda f: cut(f, "adapter_config.json", 100), "adapter"),
        (lambda f: rename_keys(f, "layers.0", "blocks.0"), "does not fit this base: .*blocks.0.* have no counterpart"),
        (lambda f: rename_keys(f, "lora_A.weight", "lora_C.weight"), "does not fit this base"),
    ],
)
def test_damaged_adapters(adapter, damage, message):
    damage(adapter)
    with pytest.raises(ModelLoadError, match=message) as caught:
        load(FOLDER / "llama", adapter)
    assert str(adapter) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_adapter_of_another_model_is_refused(adapter, model):
    config = json.loads((model / "config.json").read_text())
    weights = load_file(model / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "layers.2" not in name}
    save_file(kept, model / "model.safetensors", {"format": "pt"})
    (model / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    with pytest.raises(ModelLoadError, match="does not fit this base"):
        load(model, adapter)


def test_an_adapter_of_another_family_is_refused_though_every_shape_fits():
    with pytest.raises(ModelLoadError, match="was made for a MistralBiModel and this base is a LlamaModel"):
        load(FOLDER / "llama", FOLDER / "mistral-lora")


def test_an_adapter_that_names_no_base_cannot_be_one(adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(ModelLoadError, match="names no base_model_name_or_path: pass the base"):
        load(adapter)


def test_a_model_that_cannot_attend_both_ways_is_refused_by_name(model):
    from transformers import AutoModel, BloomConfig

    config = BloomConfig(vocab_size=384, hidden_size=16, n_layer=1, n_head=2)
    AutoModel.from_config(config).save_pretrained(model)
    with pytest.raises(UnsupportedModelError, match="Bloom"):
        load(model)


def test_code_that_comes_with_a_checkpoint_is_not_run(model):
    config = json.loads((model / "config.json").read_text())
    automatic = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    (model / "config.json").write_text(json.dumps({**config, "model_type": "unknown", "auto_map": automatic}))
    (model / "evil.py").write_text("raise SystemExit('remote code ran')")
    with pytest.raises(ModelLoadError, match="contains custom code"):
        load(model)


def test_a_folder_of_sentence_transformers_says_that_its_pooling_is_not_read(model, tmp_path):
    (model / "modules.json").write_text("[]")
    with pytest.warns(
        UserWarning, match=r"saved by sentence-transformers, whose settings .* are not read: pass pooling"
    ):
        encoder = load(model, pooling_mode="last_token")
    encoder.save(tmp_path / "saved")
    (tmp_path / "saved" / "modules.json").write_text("[]")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(tmp_path / "saved").pooling_mode == "last_token"
