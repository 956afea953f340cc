"""The library's adapter is only replaced by one that finds what the demo asks for."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.reproduce import release


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The library's place for the adapter, holding an old one; a finished run lies beside it."""
    ready, trained = tmp_path / "adapters" / release.CONFIG, tmp_path / "run" / release.STAGES[-1]
    for folder, text in ((ready, "old"), (trained, "new")):
        folder.mkdir(parents=True)
        (folder / release.ADAPTER).write_text(text)
    monkeypatch.setattr(release.adapters, "__file__", str(tmp_path / "adapters" / "__init__.py"))

    def copy(folder: Path, candidate: Path) -> None:
        candidate.mkdir()
        (candidate / release.ADAPTER).write_bytes((folder / release.STAGES[-1] / release.ADAPTER).read_bytes())

    monkeypatch.setattr(release, "_write", copy)
    return ready


def test_an_adapter_that_finds_everything_takes_the_place(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(release, "missed", lambda adapter: {})
    release.release(tmp_path / "run")
    assert (package / release.ADAPTER).read_text() == "new"


def test_one_that_misses_something_is_kept_aside(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(release, "missed", lambda adapter: {"turn an object into json": ["hashlib.new"]})
    release.release(tmp_path / "run")
    assert (package / release.ADAPTER).read_text() == "old"
    assert (tmp_path / "run" / "release" / release.ADAPTER).read_text() == "new"
    assert "'turn an object into json' finds hashlib.new" in capsys.readouterr().out


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run: its last adapter, its scores and the time that it took."""
    trained = tmp_path / release.STAGES[-1]
    trained.mkdir()
    save_file({"x.lora_A.weight": torch.linspace(-1, 1, 64).view(4, 16)}, trained / release.ADAPTER)
    config = {"r": 4, "base_model_name_or_path": "/some/folder", "target_modules": ["v_proj", "q_proj"]}
    (trained / "adapter_config.json").write_text(json.dumps(config))
    (trained / "llm2vec_config.json").write_text("{}")
    for stage in release.STAGES:
        (tmp_path / stage).mkdir(exist_ok=True)
        (tmp_path / stage / "seconds.json").write_text("3600")
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores" / "contrastive-sts.json").write_text('{"test": 71.25}')
    return tmp_path


def test_what_is_released_is_in_float16_and_names_its_base_and_its_scores(run: Path) -> None:
    release._write(run, run / "release")
    weights = load_file(run / "release" / release.ADAPTER)["x.lora_A.weight"]
    assert weights.dtype == torch.float16
    torch.testing.assert_close(weights.float(), torch.linspace(-1, 1, 64).view(4, 16), rtol=1e-3, atol=0)
    config = json.loads((run / "release" / "adapter_config.json").read_text())
    assert config == {"r": 4, "base_model_name_or_path": release.BASE, "target_modules": ["q_proj", "v_proj"]}
    card = (run / "release" / "README.md").read_text()
    assert "| + contrastive on pairs | 71.2 |" in card
    assert "adapter of rank 4" in card
    assert "trained in 3.0 hours" in card
    assert "max_steps: 1200" in card


def test_an_adapter_that_is_too_large_is_not_released(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(release, "MOST_BYTES", 127)
    with pytest.raises(ValueError, match="takes 128 bytes, over 127: lower saved_rank"):
        release._write(run, run / "release")
    assert not (run / "release").exists()
