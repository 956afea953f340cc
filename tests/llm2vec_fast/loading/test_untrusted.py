"""What a download says is of no effect beyond what it may say: it runs no code and opens no pickle."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from reference_data import FOLDER, TEXTS
from safetensors.torch import save_file

from llm2vec_fast import LLM2Vec
from llm2vec_fast.errors import ModelLoadError
from llm2vec_fast.training.word_level import WordClassifier


@pytest.fixture
def model(tmp_path) -> Path:
    """A folder with code in it that tells when it runs."""
    folder = Path(shutil.copytree(FOLDER / "llama", tmp_path / "model"))
    code = f"open({str(tmp_path / 'ran')!r}, 'w').write('ran')\nfrom transformers import *\n"
    (folder / "evil.py").write_text(f"{code}class Evil(LlamaConfig):\n    model_type = 'evil'\n")
    return folder


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **changes}))


def load(*sources, **options) -> LLM2Vec:
    return LLM2Vec.from_pretrained(*sources, **{"dtype": "float32", "device": "cpu", **options})


AUTO = {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]}


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("config.json", {"auto_map": AUTO}),
        ("config.json", {"auto_map": AUTO, "model_type": "evil"}),
        ("config.json", {"auto_map": AUTO, "trust_remote_code": True, "model_type": "evil"}),
        ("tokenizer_config.json", {"auto_map": AUTO, "tokenizer_class": "Evil"}),
        ("tokenizer_config.json", {"auto_map": AUTO, "trust_remote_code": True, "tokenizer_class": "Evil"}),
        ("llm2vec_config.json", {"trust_remote_code": True, "base_model_name_or_path": "evil"}),
        ("config.json", {"trust_remote_code": True, "custom_pipelines": {"x": {"impl": "evil.Evil"}}}),
        ("generation_config.json", {"custom_generate": "evil", "trust_remote_code": True}),
    ],
)
def test_no_file_of_a_download_runs_its_code(tmp_path, model, file, changes):
    edit(model / file, **changes)
    with contextlib.suppress(ModelLoadError):  # or it is of no effect
        assert torch.equal(load(model).encode(TEXTS), load(FOLDER / "llama").encode(TEXTS))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_no_configuration_fetches_a_kernel(model, monkeypatch, name):
    """An attention may be named by a repository of kernels, which are machine code."""
    fetched: list[object] = []
    for place in ("hub_kernels.load_and_register_attn_kernel", "hub_kernels.lazy_load_kernel"):
        monkeypatch.setattr(
            f"transformers.integrations.{place}", lambda *names, **_: fetched.append(names), raising=False
        )
    edit(model / "config.json", **{name: "kernels-community/flash-attn"})
    assert torch.equal(load(model).encode(TEXTS), load(FOLDER / "llama").encode(TEXTS))
    assert not fetched


def test_no_configuration_names_a_pickle_as_its_weights(model):
    edit(model / "config.json", transformers_weights="adapter_model.bin")
    (model / "adapter_model.bin").write_bytes(b"a pickle would be here")
    with pytest.raises(ModelLoadError, match=r"names adapter_model\.bin as its weights: only \*\.safetensors are read"):
        load(model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pooling_mode": "everything"}, "has pooling_mode='everything', which is not one of mean"),
        ({"pooling_mode": ["mean"]}, "pooling_mode"),
        ({"max_length": "512"}, "has max_length='512', which is not a positive number of tokens"),
        ({"doc_max_length": -1}, "doc_max_length=-1"),
        ({"max_length": True}, "max_length=True"),
        ({"skip_instruction": "no"}, "skip_instruction='no', which is not true or false"),
        ({"enable_bidirectional": 0.5}, "enable_bidirectional"),
        ({"checkpoint": {"a": 1}}, "checkpoint"),
    ],
)
def test_settings_of_another_kind_are_refused(model, settings, message):
    edit(model / "llm2vec_config.json", **settings)
    with pytest.raises(ModelLoadError, match=message) as caught:
        load(model)
    assert str(model) in str(caught.value)


def test_settings_that_are_none_of_ours_are_of_no_effect(model):
    edit(model / "llm2vec_config.json", device="nowhere", dtype="float64", checkpoint=None, accelerate=False)
    assert torch.equal(load(model).encode(TEXTS), load(FOLDER / "llama").encode(TEXTS))


def head(folder: Path, columns: int = 64, **changes) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({"linear.weight": torch.ones(2, columns), "linear.bias": torch.zeros(2)}, folder / "head.safetensors")
    encoder = {"base_model_name_or_path": str(FOLDER / "llama"), **changes.pop("encoder", {})}
    settings = {"labels": ["a", "b"], "retroactive_labels": "same_token", "encoder": encoder, **changes}
    (folder / "word_level_config.json").write_text(json.dumps(settings))
    return folder


def test_a_word_level_head_that_is_honest(tmp_path):
    folder = head(tmp_path / "head", encoder={"max_length": 64, "merge_peft": True, "enable_bidirectional": True})
    assert len(WordClassifier.from_pretrained(folder, device="cpu").predict([["rain", "fell"]])[0]) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"encoder": {"trust_remote_code": True}},
            "has trust_remote_code=True for its encoder, which such a file may not",
        ),
        ({"encoder": {"code_revision": "main"}}, "code_revision"),
        ({"encoder": {"cache_dir": "/tmp"}}, "cache_dir"),
        ({"encoder": {"device_map": "auto"}}, "device_map"),
        ({"encoder": {"base_model_name_or_path": ["x"]}}, "names no encoder"),
        ({"encoder": {"max_length": "64"}}, "max_length='64' for its encoder: that is damaged"),
        ({"encoder": {"max_length": True}}, "max_length=True"),
        ({"labels": "ab"}, "no list of labels"),
        ({"labels": ["a", "b", "c"]}, "does not fit its encoder of 64 columns and 3 labels"),
        ({"columns": 32}, "does not fit its encoder of 64 columns"),
        ({"retroactive_labels": "x"}, "retroactive_labels='x'"),
    ],
)
def test_a_word_level_head_says_of_its_encoder_what_it_may(tmp_path, changes, message):
    with pytest.raises(ModelLoadError, match=message):
        WordClassifier.from_pretrained(head(tmp_path / "head", **changes), device="cpu")


def test_the_caller_overrules_what_a_head_says(tmp_path):
    folder = head(tmp_path / "head", encoder={"max_length": 64})
    assert WordClassifier.from_pretrained(folder, device="cpu", max_length=32).encoder.max_length == 32
