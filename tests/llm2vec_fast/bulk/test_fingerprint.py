"""A model is known by the content of the files that decide its embeddings, and by nothing else."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from llm2vec_fast.bulk import fingerprint as module
from llm2vec_fast.bulk.fingerprint import fingerprint
from llm2vec_fast.errors import ModelLoadError


def marks(model: Path, adapter: Path | None = None) -> dict[str, str | None]:
    found = fingerprint(str(model), str(adapter) if adapter else None)
    return {name: part and part["sha256"] for name, part in found.items()}


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("model.safetensors", {"model"}),
        ("config.json", {"model"}),
        ("llm2vec_config.json", {"model"}),
        ("tokenizer.json", {"tokenizer"}),
        ("special_tokens_map.json", {"tokenizer"}),
        ("README.md", set()),
        ("trainer_state.json", set()),
    ],
)
def test_a_file_changes_what_it_decides(model: Path, name: str, changed: set[str]) -> None:
    before = marks(model)
    (model / name).write_text("something else")
    after = marks(model)
    assert {part for part in before if before[part] != after[part]} == changed


def test_a_copy_is_the_same_model(model: Path, tmp_path: Path) -> None:
    assert marks(Path(shutil.copytree(model, tmp_path / "copy"))) == marks(model)
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_text("quantised weights")
    assert marks(tmp_path / "a.gguf") == marks(tmp_path / "b.gguf")


def test_a_folder_that_holds_an_adapter_alone_is_known_by_its_base_too(model: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(model)}))
    (adapter / "adapter_model.safetensors").write_text("low rank")
    before = marks(adapter)
    assert marks(model, adapter)["adapter"] is not None
    (model / "model.safetensors").write_text("other weights")
    assert marks(adapter)["model"] != before["model"]


def test_unchanged_files_are_not_read_again(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fingerprint(str(model), None)
    (model / "config.json").write_text('{"other": 1}')
    read: list[str] = []
    real = module.sha256_of
    monkeypatch.setattr(module, "sha256_of", lambda path: read.append(path.name) or real(path))
    again = fingerprint(str(model), None, known=first)
    assert read == ["config.json"]
    os.utime(model / "tokenizer.json", ns=(0, 0))
    fingerprint(str(model), None, known=again)
    assert read == ["config.json", "tokenizer.json"]


@pytest.mark.parametrize("name", ["/no/such/model", "./model", "a/b/c", "model.gguf"])
def test_a_path_that_does_not_exist_is_refused_without_asking_the_hub(name: str) -> None:
    with pytest.raises(ModelLoadError, match="does not exist: give a model folder, a GGUF file or a hub name"):
        fingerprint(name, None)


def test_a_hub_name_that_cannot_be_fetched_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(name: str, **options: object) -> str:
        raise OSError("the hub cannot be reached")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(ModelLoadError, match="model nobody/nothing is no folder here and cannot be fetched"):
        fingerprint("nobody/nothing", None)
