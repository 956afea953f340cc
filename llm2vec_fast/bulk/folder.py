"""The output folder of a bulk job: made ready, and what finished parts of it a job can go on with."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llm2vec_fast.bulk.checking import CHECKED, checked_parts, faults, remember_checked
from llm2vec_fast.bulk.fingerprint import fingerprint
from llm2vec_fast.bulk.manifest import JOB_FOLDER, JOURNAL, MANIFEST, Manifest, read_manifest
from llm2vec_fast.bulk.problems import ERRORS
from llm2vec_fast.bulk.settings import EmbedSettings
from llm2vec_fast.data.inputs import InputFile
from llm2vec_fast.errors import OutputError
from llm2vec_fast.jobs.files import LEFTOVERS, is_leftover, remove_leftovers, remove_own
from llm2vec_fast.jobs.lock import HOLDER, LOCK

NOBODYS = (JOB_FOLDER, ".DS_Store", "Thumbs.db", "desktop.ini", "lost+found")  # what systems put into an empty folder
TELL_EVERY_SECONDS = 10.0
SHOWN_FAULTS = 5


def prepare(folder: Path) -> None:
    """Make the folder ready to be locked.

    Raises:
        OutputError: it holds somebody else's files, or cannot be written.
    """
    try:
        if folder.exists() and not (folder / MANIFEST).exists():
            read_manifest(folder)  # of an earlier release: that is said first
            foreign = sorted(p.name for p in folder.iterdir() if p.name not in NOBODYS and not is_leftover(p))
            if foreign:
                raise OutputError(f"{folder} has other files ({foreign[0]}, …): give a new --output folder")
        (folder / JOB_FOLDER).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"output folder {folder} cannot be used: {error.strerror}") from error


def remove_embeddings(folder: Path) -> None:
    """Remove what `embed` wrote into a folder, and the folder where nothing else is left."""
    remove_own(folder / JOB_FOLDER, (LOCK, HOLDER, JOURNAL, CHECKED, LEFTOVERS))
    remove_own(folder, ("part-*.parquet", MANIFEST, ERRORS, LEFTOVERS))


def open_manifest(
    folder: Path,
    settings: EmbedSettings,
    files: Sequence[InputFile],
    notify: Callable[[str], None],
    go_on: Callable[[Manifest], None],
) -> Manifest:
    """The folder's manifest without parts that are damaged or gone, or a new one, not written yet.

    Args:
        go_on: called between two parts that are checked; it may raise, to stop.

    Raises:
        OutputError: the manifest is damaged, or the folder cannot be written.
        ChangedError: the folder is another job's.
    """
    for place in (folder, folder / JOB_FOLDER):
        remove_leftovers(place)
    manifest = read_manifest(folder)
    if manifest is None:
        return Manifest.new(settings, fingerprint(settings.model, settings.adapter, hub=settings.hub), files)
    marks = fingerprint(settings.model, settings.adapter, manifest.fingerprint, settings.hub)
    manifest.require_same(settings, marks, files, folder)
    manifest.fingerprint = marks
    _drop_damaged(folder, manifest, notify, go_on)
    return manifest


def _drop_damaged(
    folder: Path, manifest: Manifest, notify: Callable[[str], None], go_on: Callable[[Manifest], None]
) -> None:
    """Forget parts that are not what was written: they are made again, and that is said."""
    teller = Teller(len(manifest.parts), notify)

    def each(count: int) -> None:
        go_on(manifest)
        teller.tell(count)

    found = faults(folder, manifest, trusted=checked_parts(folder), each=each)
    for index in list(found)[:SHOWN_FAULTS]:
        notify(f"{manifest.parts[index].name} {found[index]}: it is made again")
    if len(found) > SHOWN_FAULTS:
        notify(f"{len(found) - SHOWN_FAULTS:,} more parts are damaged or gone: they are made again")
    for index in found:
        del manifest.parts[index]
        manifest.state = "unfinished"
    if manifest.parts:
        remember_checked(folder, manifest)


@dataclass
class Teller:
    """Says now and then how many of ``total`` parts are checked."""

    total: int
    notify: Callable[[str], None]
    _last: float = field(default_factory=time.monotonic)

    def tell(self, count: int) -> None:
        """``count`` parts are checked."""
        now = time.monotonic()
        if now - self._last >= TELL_EVERY_SECONDS:
            self._last = now
            self.notify(f"{count:,} of {self.total:,} parts are checked")
