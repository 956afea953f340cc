"""Whether a folder of embeddings is what was written: every byte of it is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from llm2vec_fast.bulk.checking import faults, forget_checked
from llm2vec_fast.bulk.folder import Teller
from llm2vec_fast.bulk.manifest import MANIFEST, Manifest, read_manifest
from llm2vec_fast.bulk.problems import ERRORS, digests
from llm2vec_fast.errors import InputError
from llm2vec_fast.jobs.files import is_leftover


@dataclass
class Report:
    """What was found. ``faults`` are sentences about what is not as it was written; ``rows`` are embeddings."""

    parts: int
    rows: int
    bad_rows: int
    bytes: int
    finished: bool
    faults: list[str] = field(default_factory=list)


def verify(folder: Path, *, notify: Callable[[str], None] = lambda sentence: None) -> Report:
    """Compare every part's size, footer, rows, type and SHA-256, and the rows left out, with the manifest.

    No model is loaded, no part is changed. After a fault the next job in the folder reads all its parts again, for what
    a disk lost shows in no size and in no time.

    Raises:
        InputError: the folder was not written by `llm2vec-fast embed`.
        OutputError: its manifest is damaged.
    """
    folder = folder.expanduser()
    manifest = read_manifest(folder)
    if manifest is None:
        raise InputError(f"{folder} has no {MANIFEST}: give a folder that `llm2vec-fast embed` wrote")
    teller = Teller(len(manifest.parts), notify)
    found = faults(folder, manifest, each=teller.tell)
    if found:
        forget_checked(folder)
    report = Report(
        parts=len(manifest.parts),
        rows=manifest.total("rows"),
        bad_rows=manifest.total("bad_rows"),
        bytes=manifest.total("bytes"),
        finished=manifest.finished,
        faults=[f"{manifest.parts[index].name} {fault}" for index, fault in found.items()],
    )
    if manifest.finished:
        report.faults += _gaps(manifest) + _strangers(folder, manifest)
    return report


def _gaps(manifest: Manifest) -> list[str]:
    numbers = sorted(manifest.parts)
    missing = [number for number in range(numbers[-1] if numbers else 0) if number not in manifest.parts]
    return [f"part {number} is missing from the manifest" for number in missing]


def _strangers(folder: Path, manifest: Manifest) -> list[str]:
    """Files that a reader of the folder would take for a part, and lines of parts that there are none of."""
    own = {part.name for part in manifest.parts.values()}
    others = sorted(
        p.name for p in folder.iterdir() if p.name not in own and p.suffix == ".parquet" and not is_leftover(p)
    )
    sentences = [f"{name} is no part of it, but a reader of the folder takes it for one" for name in others]
    if digests(folder).keys() - manifest.parts.keys():
        sentences.append(f"{ERRORS} has lines of no part of it")
    return sentences
