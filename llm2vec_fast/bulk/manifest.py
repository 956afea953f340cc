"""What a folder of embeddings says about itself: _manifest.json, and beside it the journal of parts finished since.

The manifest is replaced when a job starts and ends; a finished part only adds a line to the journal, so that its cost
does not grow with the number of parts and inputs. Reading folds the journal in. A folder may come from a stranger:
nothing of it is used before it was found to be of the kind that is written here."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, TypedDict

from llm2vec_fast.bulk.corpus import Cursor
from llm2vec_fast.bulk.settings import EmbedSettings, changed_settings
from llm2vec_fast.data.inputs import InputFile
from llm2vec_fast.errors import OutputError
from llm2vec_fast.jobs.changes import changed_error
from llm2vec_fast.jobs.environment import Environment
from llm2vec_fast.jobs.files import append_lines, json_bytes, read_json_lines, replace_json
from llm2vec_fast.jobs.typed import MistypedError, dataclass_from, of_type, shown

FORMAT = "llm2vec-fast embeddings"
FORMAT_VERSION = 2
MANIFEST = "_manifest.json"  # dataset readers pass over names that begin with an underscore
OLD_MANIFEST = "manifest.json"  # of format 1
JOB_FOLDER = ".job"  # lock and journal
JOURNAL = "parts.jsonl"
MARKS = ("model", "tokenizer", "adapter")
_SHA256 = re.compile("[0-9a-f]{64}")
Pooling = Literal[
    "mean",
    "weighted_mean",
    "mean_sqrt_len",
    "mean_sqrt_len_tokens",
    "max",
    "eos_token",
    "last_token",
    "bos_token",
    "last",
    "first",
]
Dtype = Literal["float32", "bfloat16", "float16", "float64"]
_CHOICES = {"dtype": Dtype | Literal["auto"], "output_dtype": Literal["float32", "float16"], "pooling": Pooling | None}


@dataclass(frozen=True)
class _Written:
    """The types of what is written; the totals are for readers."""

    format: str
    format_version: int
    state: Literal["unfinished", "finished"]
    created: str
    updated: str
    rows: int
    bad_rows: int
    tokens: int
    resolved: Resolved
    settings: EmbedSettings
    model: dict
    tokenizer: dict
    adapter: dict | None
    environments: list[Environment]
    inputs: list[InputFile]
    parts: list[Part]


class Resolved(TypedDict, total=False):
    """What the settings' open choices came to."""

    dimension: int
    device: str
    dtype: Dtype
    pooling: Pooling | None
    max_length: int | None
    doc_max_length: int | None
    token_budget: int | None
    rows_per_shard: int
    types: dict[str, str]
    arrow_types: str


def part_name(index: int) -> str:
    """The file of a part."""
    return f"part-{index:05d}.parquet"


@dataclass(frozen=True)
class Part:
    """A finished part.

    ``first_row`` is 0-based over the whole corpus and counts bad rows; ``rows`` were embedded. ``errors_sha256`` is of
    its lines in _errors.jsonl, ``environment`` the place in the manifest's list of what computed it.
    """

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
    errors_sha256: str
    environment: int
    start: Cursor
    end: Cursor


@dataclass
class Manifest:
    """The state of an output folder. ``resolved`` holds what was chosen where the settings leave it open,
    ``environments`` what computed the parts: see `jobs.environment`."""

    settings: dict[str, Any]
    fingerprint: dict[str, Any]
    inputs: list[dict[str, Any]]
    resolved: dict[str, Any] = field(default_factory=dict)
    parts: dict[int, Part] = field(default_factory=dict)
    environments: list[Environment] = field(default_factory=list)
    state: str = "unfinished"
    created: str = ""

    @classmethod
    def new(cls, settings: EmbedSettings, fingerprint: dict[str, Any], inputs: Sequence[InputFile]) -> Manifest:
        return cls(settings.as_json(), fingerprint, [asdict(file) for file in inputs], created=_now())

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
        OutputError: the manifest or the journal is damaged, of another format, or says what none can say.
    """
    path = folder / MANIFEST
    if not path.exists():
        _refuse_format_1(folder)
        return None
    try:
        journal = list(read_json_lines(folder / JOB_FOLDER / JOURNAL))  # first, as a job that ends drops it last
        value = of_type(dict, json.loads(path.read_text(encoding="utf-8")), "it")
        found = value.get("format"), value.get("format_version")
        if found != (FORMAT, FORMAT_VERSION) and None not in found:
            raise OutputError(
                f"{path} is of format {shown(found[0])} version {shown(found[1])}, this program reads {FORMAT!r} "
                f"version {FORMAT_VERSION}: use the release that wrote it"
            )
        manifest = _manifest_from(value)
        for line in journal:
            part = dataclass_from(Part, line, f"a line of {JOB_FOLDER}/{JOURNAL}")
            _require_possible(part, len(manifest.environments))
            manifest.parts.setdefault(part.index, part)
        _require_in_order(manifest)
    except (OSError, ValueError, RecursionError) as error:
        raise OutputError(f"{path} is damaged ({error}): embed again into a new folder") from error
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace the manifest, then drop the journal that it now contains."""
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
        "environments": manifest.environments,
        "inputs": manifest.inputs,
        "parts": [asdict(manifest.parts[index]) for index in sorted(manifest.parts)],
    }
    replace_json(folder / MANIFEST, value)
    (folder / JOB_FOLDER / JOURNAL).unlink(missing_ok=True)


def record_part(folder: Path, part: Part) -> None:
    """From here on the part counts as finished, whatever happens."""
    append_lines(folder / JOB_FOLDER / JOURNAL, [json_bytes(asdict(part))])


def _refuse_format_1(folder: Path) -> None:
    path = folder / OLD_MANIFEST
    try:
        of_format_1 = json.loads(path.read_text(encoding="utf-8")).get("format") == FORMAT
    except (OSError, ValueError, AttributeError):
        return
    if of_format_1:
        raise OutputError(
            f"{folder} was written by an earlier release (it has a {OLD_MANIFEST}): use that release for it, or embed "
            "again into a new folder"
        )


def _manifest_from(value: dict[str, Any]) -> Manifest:
    """Raises MistypedError where a name is unknown, or a value none that is written."""
    written = dataclass_from(_Written, value, "it")
    for name in MARKS:
        if value[name] is not None:
            _require_mark(value[name], name)
    _require_settings(written.settings)
    _require_resolved(written)
    for part in written.parts:
        _require_possible(part, len(written.environments))
    return Manifest(
        settings=written.settings.as_json(),
        fingerprint={name: value[name] for name in MARKS},
        inputs=value["inputs"],
        resolved=dict(written.resolved),
        parts={part.index: part for part in written.parts},
        environments=written.environments,
        state=written.state,
        created=written.created,
    )


def _require_settings(settings: EmbedSettings) -> None:
    for name, kind in _CHOICES.items():
        of_type(kind, getattr(settings, name), f"{name} of settings")
    for name in ("truncate_dim", "max_length", "doc_max_length", "token_budget", "rows_per_shard"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise MistypedError(f"{name} of settings is {value}")


def _require_resolved(written: _Written) -> None:
    """Once there are parts there is a dimension and types of their columns, and numbers that a model can have."""
    missing = [name for name in ("dimension", "arrow_types") if name not in written.resolved]
    if written.parts and missing:
        raise MistypedError(f"it has parts and no {missing[0]}")
    for name, value in written.resolved.items():
        if type(value) is int and not 1 <= value < 2**31:
            raise MistypedError(f"{name} of resolved is {value}")


def _require_mark(mark: dict[str, Any], name: str) -> None:
    """What is used of a model's fingerprint: its place and its hash, and those of its files."""
    of_type(list[dict], mark.get("files"), f"files of {name}")
    for described in (mark, *mark["files"]):
        of_type(str, described.get("path"), f"path of {name}")
        if not _SHA256.fullmatch(of_type(str, described.get("sha256"), f"sha256 of {name}")):
            raise MistypedError(f"sha256 of {name} is {shown(described['sha256'])}")


def _require_possible(part: Part, environments: int) -> None:
    """A part has the one name that its number gives it, so that none lies outside the folder."""
    where = f"part {part.index}"
    if part.name != part_name(part.index):
        raise MistypedError(f"name of {where} is {shown(part.name)}, not {part_name(part.index)!r}")
    for name, value in {**vars(part), **vars(part.start), **vars(part.end)}.items():
        if type(value) is int and value < 0:
            raise MistypedError(f"{name} of {where} is {value}")
    for name in ("sha256", "errors_sha256"):
        if not _SHA256.fullmatch(getattr(part, name)):
            raise MistypedError(f"{name} of {where} is {shown(getattr(part, name))}")
    if part.environment >= environments:
        raise MistypedError(f"environment of {where} is {part.environment} of {environments}")


def _require_in_order(manifest: Manifest) -> None:
    """Each part begins where the one before it ends, or rows would be lost between them, or be there twice."""
    for index, part in manifest.parts.items():
        before = manifest.parts.get(index - 1)
        if index == 0:
            begins = part.start == Cursor() and part.first_row == 0
        else:
            begins = before is None or (
                part.start == before.end and part.first_row == before.first_row + before.rows_read
            )
        if not begins:
            raise MistypedError(f"part {index} does not begin where the one before it ends")


def _changed_fingerprint(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    changes = []
    for name in MARKS:
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
