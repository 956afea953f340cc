"""A model is known by the content of the files that decide its embeddings, and by nothing else."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from reference_data import FOLDER
from safetensors.torch import load_file, save_file

from llm2vec_fast import LLM2Vec
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
    with pytest.raises(ModelLoadError, match="does not exist: check the path"):
        fingerprint(name, None)


def test_a_hub_name_that_is_not_cached_is_refused_where_the_hub_may_not_be_asked() -> None:
    with pytest.raises(ModelLoadError, match="nobody/nothing is neither a folder here nor in the cache"):
        fingerprint("nobody/nothing", None)


@pytest.fixture
def chain(tmp_path: Path) -> dict[str, Path]:
    """A base, an adapter that names it and holds a configuration of its own, an adapter that names that, one on top."""
    base = Path(shutil.copytree(FOLDER / "llama", tmp_path / "base"))
    folders = {"base": base}
    for name, below in (("first", base), ("second", tmp_path / "first"), ("top", base)):
        folders[name] = Path(shutil.copytree(FOLDER / "llama-lora", tmp_path / name))
        config = json.loads((folders[name] / "adapter_config.json").read_text())
        changed = json.dumps({**config, "base_model_name_or_path": str(below)})
        (folders[name] / "adapter_config.json").write_text(changed)
    shutil.copy(base / "config.json", folders["first"])  # as adapters on a hub often have one
    return folders


def shifted(path: Path) -> None:
    weights = load_file(path)
    save_file({name: value + 0.01 for name, value in weights.items()}, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("changed", "part"),
    [
        ("base/model.safetensors", "model"),
        ("first/adapter_model.safetensors", "model"),
        ("second/adapter_model.safetensors", "model"),
        ("top/adapter_model.safetensors", "adapter"),
    ],
)
def test_every_weight_that_loading_reads_is_covered(chain: dict[str, Path], tmp_path: Path, changed: str, part: str):
    def embed() -> torch.Tensor:
        encoder = LLM2Vec.from_pretrained(chain["second"], chain["top"], dtype="float32", device="cpu")
        return encoder.encode(["one text", "another"])

    before, vectors = marks(chain["second"], chain["top"]), embed()
    shifted(tmp_path / changed)
    after = marks(chain["second"], chain["top"])
    assert not torch.equal(embed(), vectors)
    assert {name for name in before if before[name] != after[name]} == {part}


@pytest.mark.parametrize("changed", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_files_of_the_base_under_an_adapter_are_covered(chain: dict[str, Path], changed: str) -> None:
    before = marks(chain["first"])
    content = json.loads((chain["base"] / changed).read_text())
    (chain["base"] / changed).write_text(json.dumps({**content, "rms_norm_eps": 0.5}))
    assert marks(chain["first"]) != before


def test_what_is_covered_is_all_that_loading_needs(chain: dict[str, Path], tmp_path: Path) -> None:
    """The covered files alone load to the same embeddings, and what is not covered changes none."""
    texts = ["one text", "another"]

    def embed(*places: Path) -> torch.Tensor:
        return LLM2Vec.from_pretrained(*places, dtype="float32", device="cpu").encode(texts)

    expected = embed(chain["base"], chain["top"])
    covered = fingerprint(str(chain["base"]), str(chain["top"]))
    for part in covered.values():
        for file in part["files"]:
            path = Path(file["path"])
            (tmp_path / "alone" / path.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, tmp_path / "alone" / path.parent.name)
    assert torch.equal(embed(tmp_path / "alone" / "base", tmp_path / "alone" / "top"), expected)
    before = marks(chain["base"], chain["top"])
    for name in (
        "modules.json",
        "1_Pooling/config.json",
        "pytorch_model.bin",
        "model.pt",
        "notes.json",
        "x.py",
        "config",
    ):
        for folder in (chain["base"], chain["top"]):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text('{"pooling_mode": "last_token", "hidden_size": 1}')
    assert marks(chain["base"], chain["top"]) == before
    assert torch.equal(embed(chain["base"], chain["top"]), expected)


def test_a_folder_with_a_model_and_an_adapter_is_refused(chain: dict[str, Path]) -> None:
    shutil.copy(chain["base"] / "model.safetensors", chain["first"])
    with pytest.raises(ModelLoadError, match=r"holds a whole model \(config\.json\) and an adapter"):
        fingerprint(str(chain["first"]), None)
    with pytest.raises(ModelLoadError, match="holds a whole model"):
        LLM2Vec.from_pretrained(chain["first"])


def test_an_adapter_that_names_itself_is_refused(chain: dict[str, Path]) -> None:
    config = json.loads((chain["top"] / "adapter_config.json").read_text())
    changed = json.dumps({**config, "base_model_name_or_path": str(chain["top"])})
    (chain["top"] / "adapter_config.json").write_text(changed)
    with pytest.raises(ModelLoadError, match="names itself as its base"):
        fingerprint(str(chain["top"]), None)
