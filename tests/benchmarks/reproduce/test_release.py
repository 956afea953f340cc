"""The library's adapter is only replaced by one that finds what the demo asks for."""

from pathlib import Path

import pytest

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
