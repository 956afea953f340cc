"""A job on a hub model is on one commit of it: embedded, gone on with and searched."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from fake_hub import commit_of, fill_cache
from folders import embeddings, manifest
from huggingface_hub import constants
from reference_data import FOLDER
from safetensors.torch import load_file, save_file

from llm2vec_fast import LLM2Vec
from llm2vec_fast.bulk.job import embed
from llm2vec_fast.bulk.search import search
from llm2vec_fast.bulk.settings import EmbedSettings
from llm2vec_fast.errors import ChangedError
from llm2vec_fast.mining.settings import MiningSettings

TEXTS = ["one text", "another one", "and the third"]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """org/model in the cache, in two versions that differ in weights and pooling."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    folders = {}
    for name, scale in (("main", 1.0), ("v1", -0.7)):
        folders[name] = Path(shutil.copytree(FOLDER / "llama", tmp_path / name))
        weights = load_file(folders[name] / "model.safetensors")
        save_file({k: v * scale for k, v in weights.items()}, folders[name] / "model.safetensors", {"format": "pt"})
        fill_cache(tmp_path / "cache", "org/model", folders[name], name)
    (folders["v1"] / "llm2vec_config.json").write_text(json.dumps({"pooling_mode": "last_token"}))
    shutil.copy(folders["v1"] / "llm2vec_config.json", snapshot(tmp_path, "v1"))
    (tmp_path / "corpus.txt").write_text("".join(f"{text}\n" for text in TEXTS))
    return folders


def snapshot(tmp_path: Path, revision: str) -> Path:
    return tmp_path / "cache" / "models--org--model" / "snapshots" / commit_of("org/model", revision)


def run(tmp_path: Path, revision: str | None) -> None:
    settings = EmbedSettings("org/model", revision=revision, dtype="float32", device="cpu")
    embed([str(tmp_path / "corpus.txt")], tmp_path / "out", settings)


def expected(folder: Path) -> np.ndarray:
    return LLM2Vec.from_pretrained(folder, dtype="float32", device="cpu").encode(TEXTS, convert_to_numpy=True)


def test_a_revision_is_embedded_whole_and_kept(tmp_path: Path, hub: dict[str, Path]) -> None:
    run(tmp_path, "v1")
    np.testing.assert_array_equal(embeddings(tmp_path / "out"), expected(hub["v1"]))
    assert manifest(tmp_path / "out")["settings"]["revision"] == "v1"
    run(tmp_path, "v1")  # finished
    with pytest.raises(ChangedError, match="revision v1 -> default"):
        run(tmp_path, None)


def test_the_same_commit_is_searched_though_its_branch_has_moved(tmp_path: Path, hub: dict[str, Path]) -> None:
    run(tmp_path, None)
    np.testing.assert_array_equal(embeddings(tmp_path / "out"), expected(hub["main"]))
    (tmp_path / "cache" / "models--org--model" / "refs" / "main").write_text(commit_of("org/model", "v1"))
    for hits in search(tmp_path / "out", TEXTS, top_k=1):
        assert hits[0].score == pytest.approx(1, abs=1e-5)
    with pytest.raises(ChangedError, match=r"model .* -> "):
        run(tmp_path, None)
    with pytest.raises(ChangedError, match="was embedded with another model"):
        search(tmp_path / "out", TEXTS, model="org/model")
    found = search(tmp_path / "out", TEXTS, model="org/model", revision=commit_of("org/model", "main"))
    assert [hits[0].id for hits in found] == ["corpus.txt:1", "corpus.txt:2", "corpus.txt:3"]


def test_a_mining_job_is_of_one_revision() -> None:
    settings = [MiningSettings(EmbedSettings("org/model", revision=name)) for name in (None, "v1")]
    assert settings[0].as_json() != settings[1].as_json()
