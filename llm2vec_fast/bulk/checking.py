"""Whether finished parts are still what was written: footers at every start, checksums of what was touched since."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from llm2vec_fast.bulk.manifest import JOB_FOLDER, Manifest, Part
from llm2vec_fast.bulk.problems import digest_of, digests
from llm2vec_fast.errors import OutputError
from llm2vec_fast.jobs.files import replace_json, sha256_of

CHECKED = "checked.json"  # parts whose checksum was found right, with what `stat` says of them
NO_ERRORS = digest_of([])


def part_fault(path: Path, part: Part, manifest: Manifest) -> str | None:
    """What is wrong with a part by its size and its footer; None where nothing is."""
    try:
        size = path.stat().st_size
        if size != part.bytes:
            return f"has {size:,} bytes, not {part.bytes:,}"
        with open(path, "rb") as file:  # pyarrow opens no path that is not UTF-8
            footer = pq.read_metadata(file)
        schema = footer.schema.to_arrow_schema()
    except FileNotFoundError:
        return "is not there"
    except (OSError, pa.ArrowException) as error:
        return f"cannot be read ({str(error).splitlines()[0]})"
    if footer.num_rows != part.rows:
        return f"has {footer.num_rows:,} rows, not {part.rows:,}"
    return _schema_fault(schema, manifest)


def content_fault(path: Path, part: Part) -> str | None:
    """Reads the whole part: None where its SHA-256 is that of the manifest."""
    try:
        return None if sha256_of(path) == part.sha256 else "has another SHA-256 than when it was written"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def faults(
    folder: Path, manifest: Manifest, *, trusted: Mapping[str, Any] | None = None, each: Callable[[int], None]
) -> dict[int, str]:
    """What is wrong with each part that is not as it was written, or whose left out rows are not told any more.

    Args:
        trusted: what `checked_parts` gave; a part that `stat` says is the same is not read again but for its footer.
        each: called with the number of parts looked at so far; it may raise.
    """
    trusted, told = trusted or {}, digests(folder)
    found = {}
    for count, (part, path) in enumerate(manifest.part_paths(folder), 1):
        fault = part_fault(path, part, manifest)
        if fault is None and trusted.get(part.name) != [part.sha256, *_stamp(path)]:
            fault = content_fault(path, part)
        if fault is None and told.get(part.index, NO_ERRORS) != part.errors_sha256:
            fault = "left out rows that _errors.jsonl does not tell as it did"
        if fault is not None:
            found[part.index] = fault
        each(count)
    return found


def checked_parts(folder: Path) -> dict[str, Any]:
    """What `remember_checked` wrote; nothing where it cannot be read."""
    try:
        value = json.loads((folder / JOB_FOLDER / CHECKED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def remember_checked(folder: Path, manifest: Manifest) -> None:
    """Note that every part of the manifest is whole: just checked, or just written.

    Raises:
        OutputError: the disk is full, or the folder cannot be written.
    """
    stamps = {part.name: [part.sha256, *_stamp(path)] for part, path in manifest.part_paths(folder)}
    replace_json(folder / JOB_FOLDER / CHECKED, stamps)


def forget_checked(folder: Path) -> None:
    """Have the next job read every part again, where the folder can be written."""
    with suppress(OSError):
        (folder / JOB_FOLDER / CHECKED).unlink(missing_ok=True)


def _stamp(path: Path) -> list[int]:
    try:
        status = path.stat()
    except OSError as error:
        raise OutputError(f"{path} cannot be read: {error.strerror}") from error
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _schema_fault(schema: pa.Schema, manifest: Manifest) -> str | None:
    missing = [name for name in ("id", "embedding") if name not in schema.names]
    if missing:
        return f"has no column {missing[0]!r}"
    numbers = {"float32": pa.float32(), "float16": pa.float16()}[manifest.settings["output_dtype"]]
    wanted = pa.list_(numbers, manifest.resolved["dimension"])
    found = schema.field("embedding").type
    return None if found == wanted else f"has embeddings of type {found}, not {wanted}"
