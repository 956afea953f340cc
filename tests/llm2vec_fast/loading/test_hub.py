"""A hub's name is one commit of one repository, for every file that is read; what is missing is fetched or said."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import pytest
import torch
from fake_hub import commit_of, fill_cache, serve
from huggingface_hub import constants
from reference_data import FOLDER, TEXTS
from safetensors.torch import load_file, save_file

from llm2vec_fast import LLM2Vec
from llm2vec_fast.errors import ModelLoadError
from llm2vec_fast.loading import HubOptions, locate, resolve


def load(*sources, **options) -> LLM2Vec:
    return LLM2Vec.from_pretrained(*sources, **{"dtype": "float32", "device": "cpu", **options})


@pytest.fixture(scope="module")
def versions(tmp_path_factory) -> dict[str, Path]:
    """Two versions of a model that differ in weights, vocabulary and settings, and two of an adapter."""
    root = tmp_path_factory.mktemp("versions")
    for name, scale in (("main", 1.0), ("v1", -0.7)):
        folder = Path(shutil.copytree(FOLDER / "llama", root / name))
        weights = {key: value * scale for key, value in load_file(folder / "model.safetensors").items()}
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        adapter = Path(shutil.copytree(FOLDER / "llama-lora", root / f"adapter-{name}"))
        weights = {key: value * scale for key, value in load_file(adapter / "adapter_model.safetensors").items()}
        save_file(weights, adapter / "adapter_model.safetensors")
    tokenizer = json.loads((root / "v1" / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    (root / "v1" / "tokenizer.json").write_text(json.dumps(tokenizer))
    (root / "v1" / "llm2vec_config.json").write_text(json.dumps({"pooling_mode": "last_token", "max_length": 20}))
    return {path.name: path for path in root.iterdir()}


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


@pytest.fixture
def online(cache, monkeypatch, versions):
    """The hub at work, with org/model and org/adapter in two revisions each, and all that was asked of it."""
    repositories = {
        "org/model": {"main": versions["main"], "v1": versions["v1"]},
        "org/adapter": {"main": versions["adapter-main"], "v2": versions["adapter-v1"]},
    }
    with serve(repositories) as (address, asked):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield asked


@pytest.mark.parametrize("revision", ["main", "v1"])
def test_a_revision_is_taken_whole(cache, versions, revision):
    for name in ("main", "v1"):
        fill_cache(cache, "org/model", versions[name], name)
    ours, theirs = load("org/model", revision=revision), load(versions[revision])
    assert torch.equal(ours.encode(TEXTS), theirs.encode(TEXTS))
    assert (ours.pooling_mode, ours.max_length) == (theirs.pooling_mode, theirs.max_length)
    assert ours.checkpoint == "org/model"
    by_commit = load("org/model", revision=commit_of("org/model", revision))
    assert torch.equal(by_commit.encode(TEXTS), theirs.encode(TEXTS))


def test_an_adapter_has_the_models_revision_or_its_own(online, versions):
    expected = load(versions["main"], versions["adapter-v1"]).encode(TEXTS)
    ours = load("org/model", "org/adapter", revision="main", adapter_revision="v2")
    assert torch.equal(ours.encode(TEXTS), expected)
    with pytest.raises(ModelLoadError, match="org/adapter has no revision v1: give a branch, a tag or a commit"):
        load("org/model", "org/adapter", revision="v1")


def test_another_cache(tmp_path, cache, versions):
    for name, folder in (("org/model", "v1"), ("org/adapter", "adapter-main")):
        fill_cache(tmp_path / "elsewhere", name, versions[folder])
    ours = load("org/model", "org/adapter", cache_dir=tmp_path / "elsewhere")
    assert torch.equal(ours.encode(TEXTS), load(versions["v1"], versions["adapter-main"]).encode(TEXTS))
    with pytest.raises(ModelLoadError, match="org/model is neither a folder here nor in the cache of the hub"):
        load("org/model")


def test_what_is_only_partly_cached_is_completed(cache, online, versions):
    fill_cache(cache, "org/model", versions["main"], only={"config.json", "tokenizer.json"})
    assert torch.equal(load("org/model").encode(TEXTS), load(versions["main"]).encode(TEXTS))
    assert sum("model.safetensors" in path for path in online) >= 1


def test_what_is_only_partly_cached_is_said_where_it_cannot_be_completed(cache, versions):
    fill_cache(cache, "org/model", versions["main"], only={"config.json", "tokenizer.json"})
    with pytest.raises(
        ModelLoadError, match=r"org/model is only partly in the cache .*\(model\.safetensors is missing"
    ):
        load("org/model")


def test_a_cached_model_is_loaded_where_the_hub_cannot_be_reached(cache, monkeypatch, versions):
    fill_cache(cache, "org/model", versions["main"])
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # nobody listens there
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        assert torch.equal(load("org/model").encode(TEXTS), load(versions["main"]).encode(TEXTS))
        with pytest.raises(ModelLoadError, match=r"org/other is neither .* in the cache .* the hub cannot be reached"):
            load("org/other")


def test_a_revision_that_is_not_there(online):
    with pytest.raises(ModelLoadError, match="org/model has no revision v9: give a branch, a tag or a commit"):
        load("org/model", revision="v9")
    with pytest.raises(ModelLoadError, match="org/nothing is neither a folder here nor the name of a model on the hub"):
        load("org/nothing")


def test_a_token_reaches_every_file(cache, monkeypatch, versions):
    with serve({"org/gated": {"main": versions["main"]}}, token="hf_secret") as (address, _):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        with pytest.raises(ModelLoadError, match=r"org/gated is gated: .* token="):
            load("org/gated")
        ours = load("org/gated", token="hf_secret").encode(TEXTS)
    assert torch.equal(ours, load(versions["main"]).encode(TEXTS))


def test_local_files_only_asks_nobody(cache, online, versions):
    fill_cache(cache, "org/model", versions["main"])
    load("org/model", local_files_only=True)
    assert online == []


def test_only_what_is_read_is_fetched(tmp_path, online, versions):
    folder = Path(shutil.copytree(versions["main"], tmp_path / "big"))
    (folder / "original").mkdir()
    for name in ("original/model.safetensors", "consolidated.safetensors", "pytorch_model.bin", "photo.png", "x.py"):
        (folder / name).write_bytes(b"0" * 100)
    with serve({"org/big": {"main": folder}}) as (address, asked):
        constants.ENDPOINT, before = address, constants.ENDPOINT
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE
        constants.HUGGINGFACE_CO_URL_TEMPLATE = address + "/{repo_id}/resolve/{revision}/{filename}"
        try:
            place = locate("org/big").place
        finally:
            constants.ENDPOINT, constants.HUGGINGFACE_CO_URL_TEMPLATE = before, template
    assert {path.name for path in place.iterdir()} == {path.name for path in versions["main"].iterdir()}
    assert not any("original" in path or ".bin" in path for path in asked)


def test_a_base_that_an_adapter_names_is_taken_at_the_revision_that_it_names(tmp_path, cache, versions):
    for name in ("main", "v1"):
        fill_cache(cache, "org/model", versions[name], name)
    adapter = Path(shutil.copytree(versions["adapter-main"], tmp_path / "adapter"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    named = {**config, "base_model_name_or_path": "org/model", "revision": "v1"}
    (adapter / "adapter_config.json").write_text(json.dumps(named))
    expected = load(versions["v1"], adapter, merge_peft=True).encode(TEXTS)
    assert torch.equal(load(adapter, pooling_mode="mean", max_length=512).encode(TEXTS), expected)


def test_a_saved_adapter_names_the_commit_of_its_base(tmp_path, cache, versions):
    for name in ("main", "v1"):
        fill_cache(cache, "org/model", versions[name], name)
    encoder = load("org/model", versions["adapter-main"], revision="v1")
    encoder.save(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/model"
    assert config["revision"] == commit_of("org/model", "v1")
    assert float((load(tmp_path / "out").encode(TEXTS) - encoder.encode(TEXTS)).abs().max()) < 1e-4


def test_a_revision_means_nothing_to_a_folder():
    with pytest.raises(ModelLoadError, match=r"revision=v1 has no meaning for .*llama, which is a folder here"):
        load(FOLDER / "llama", revision="v1")


def test_a_folder_in_a_cache_is_known_by_its_repositorys_name(cache, versions):
    """A bulk job loads from the folder that it fingerprinted, and a chat model's template is found by its name."""
    snapshot = fill_cache(cache, "Qwen/Qwen2-7B-Instruct", versions["main"])
    assert load(snapshot).checkpoint == "Qwen/Qwen2-7B-Instruct"
    assert resolve(snapshot).decoder.commit == snapshot.name


def test_options_are_taken_from_keyword_arguments():
    options = {
        "revision": "v1",
        "token": None,
        "use_auth_token": "t",
        "resume_download": True,
        "max_memory": {0: "1GB"},
    }
    assert HubOptions.taken_from(options) == HubOptions(revision="v1", token="t")
    assert options == {"max_memory": {0: "1GB"}}
    with pytest.raises(ModelLoadError, match="HTTPS_PROXY"):
        HubOptions.taken_from({"proxies": {"https": "x"}})


def test_a_model_in_a_subfolder(tmp_path, versions):
    shutil.copytree(versions["v1"], tmp_path / "repository" / "inner")
    ours = load(tmp_path / "repository", subfolder="inner")
    assert torch.equal(ours.encode(TEXTS), load(versions["v1"]).encode(TEXTS))
    with pytest.raises(ModelLoadError, match="other does not exist"):
        load(tmp_path / "repository", subfolder="other")
