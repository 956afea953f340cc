"""What a folder of embeddings says about itself: manifest.json, and beside it the journal of parts finished since.

The manifest is replaced when a job starts and ends; a finished part only adds a line to the journal, so that its cost
does not grow with the number of parts and inputs. Reading folds the journal in."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from llm2vec_fast.bulk.corpus import Cursor
from llm2vec_fast.bulk.inputs import InputFile
from llm2vec_fast.bulk.settings import EmbedSettings, changed_settings
from llm2vec_fast.errors import OutputError
from llm2vec_fast.jobs.changes import changed_error, library_versions
from llm2vec_fast.jobs.files import append_lines, read_json_lines, replace_json

FORMAT = "llm2vec-fast embeddings"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
ERRORS = "errors.jsonl"
JOB_FOLDER = ".job"  # lock and journal: hidden, so that dataset readers pass over it
JOURNAL = "parts.jsonl"


@dataclass(frozen=True)
class Part:
    """A finished part. ``first_row`` is 0-based over the whole corpus and counts bad rows; ``rows`` were embedded."""

    index: int
    name: str
    first_row: int
    rows_read: int
    rows: int
    bad_rows: int
    damaged: int
    tokens: int
    input_bytes: int
    bytes: int
    sha256: str
    start: Cursor
    end: Cursor

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Part:
        return cls(**{**value, "start": Cursor(**value["start"]), "end": Cursor(**value["end"])})


@dataclass
class Manifest:
    """The state of an output folder. ``resolved`` holds what was chosen where the settings leave it open."""

    settings: dict[str, Any]
    fingerprint: dict[str, Any]
    inputs: list[dict[str, Any]]
    resolved: dict[str, Any] = field(default_factory=dict)
    parts: dict[int, Part] = field(default_factory=dict)
    state: str = "unfinished"
    created: str = ""
    versions: dict[str, str | None] = field(default_factory=dict)

    @classmethod
    def new(cls, settings: EmbedSettings, fingerprint: dict[str, Any], inputs: Sequence[InputFile]) -> Manifest:
        return cls(
            settings.as_json(),
            fingerprint,
            [asdict(file) for file in inputs],
            created=_now(),
            versions=library_versions(),
        )

    @property
    def finished(self) -> bool:
        return self.state == "finished"

    def total(self, name: str) -> int:
        """The sum of a number over all parts: "rows", "bad_rows", "damaged", "tokens", "input_bytes", "rows_read"."""
        return sum(getattr(part, name) for part in self.parts.values())

    def require_same(
        self, settings: EmbedSettings, fingerprint: dict[str, Any], inputs: Sequence[InputFile], folder: Path
    ) -> None:
        """Refuse to go on with anything else than what the folder was started with.

        Raises:
            ChangedError: it names what differs, old -> new.
        """
        changes = changed_settings(self.settings, self.resolved, settings)
        changes += _changed_fingerprint(self.fingerprint, fingerprint)
        changes += _changed_inputs(self.inputs, inputs)
        if changes:
            raise changed_error(folder, changes)

    def part_paths(self, folder: Path) -> list[tuple[Part, Path]]:
        return [(self.parts[index], folder / self.parts[index].name) for index in sorted(self.parts)]


def read_manifest(folder: Path) -> Manifest | None:
    """The folder's manifest with its journal folded in; None where there is none.

    Raises:
        OutputError: the manifest is damaged, or of another format.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if value["format"] != FORMAT or value["format_version"] != FORMAT_VERSION:
            raise OutputError(
                f"{path} is of format {value['format']!r} version {value['format_version']}, this program reads "
                f"{FORMAT!r} version {FORMAT_VERSION}: use the release that wrote it"
            )
        manifest = Manifest(
            settings=value["settings"],
            fingerprint={name: value[name] for name in ("model", "tokenizer", "adapter")},
            inputs=value["inputs"],
            resolved=value["resolved"],
            parts={part["index"]: Part.from_json(part) for part in value["parts"]},
            state=value["state"],
            created=value["created"],
            versions=value["versions"],
        )
        for line in read_json_lines(folder / JOB_FOLDER / JOURNAL):
            manifest.parts[line["index"]] = Part.from_json(line)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{path} is damaged ({error!r}): embed again into a new folder") from error
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace manifest.json, then drop the journal that it now contains."""
    value = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "state": manifest.state,
        "created": manifest.created,
        "updated": _now(),
        "rows": manifest.total("rows"),
        "bad_rows": manifest.total("bad_rows"),
        "tokens": manifest.total("tokens"),
        "resolved": manifest.resolved,
        "settings": manifest.settings,
        **manifest.fingerprint,
        "versions": manifest.versions,
        "inputs": manifest.inputs,
        "parts": [asdict(manifest.parts[index]) for index in sorted(manifest.parts)],
    }
    replace_json(folder / MANIFEST, value)
    (folder / JOB_FOLDER / JOURNAL).unlink(missing_ok=True)


def record_part(folder: Path, part: Part) -> None:
    """From here on the part counts as finished, whatever happens."""
    append_lines(folder / JOB_FOLDER / JOURNAL, [json.dumps(asdict(part))])


def _changed_fingerprint(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    changes = []
    for name in ("model", "tokenizer", "adapter"):
        before, after = old[name], new[name]
        if (before and before["sha256"]) != (after and after["sha256"]):
            changes.append(f"{name} {_shown_model(before)} -> {_shown_model(after)}")
    return changes


def _shown_model(described: dict[str, Any] | None) -> str:
    return f"{described['path']} (sha256 {described['sha256'][:12]})" if described else "none"


def _changed_inputs(old: Sequence[dict[str, Any]], new: Sequence[InputFile]) -> list[str]:
    before = {file["name"]: file for file in old}
    after = {file.name: asdict(file) for file in new}
    changes = [f"input {name}: read -> not given" for name in before if name not in after]
    changes += [f"input {name}: not there -> given" for name in after if name not in before]
    for name in before:
        if name in after:
            changes += _changed_file(before[name], after[name])
    if not changes and list(before) != list(after):
        first, now = next((old, new) for old, new in zip(before, after, strict=True) if old != new)
        changes.append(f"the order of inputs, {first} -> {now}")
    return changes


def _changed_file(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    path = new["path"]
    if old["bytes"] != new["bytes"]:
        return [f"input {path}: {old['bytes']} -> {new['bytes']} bytes"]
    if old["modified_ns"] != new["modified_ns"]:
        return [f"input {path}: modified {_time(old['modified_ns'])} -> {_time(new['modified_ns'])}"]
    return []


def _time(nanoseconds: int) -> str:
    return datetime.fromtimestamp(nanoseconds / 1e9, timezone.utc).isoformat(timespec="milliseconds")


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
