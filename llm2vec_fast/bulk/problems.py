"""_errors.jsonl: the rows that were left out, a line each, with the number of the part they would be in."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from llm2vec_fast.data.rows import Problem
from llm2vec_fast.jobs.files import append_lines, json_bytes, json_object, replacing

ERRORS = "_errors.jsonl"  # dataset readers pass over names that begin with an underscore


def append_problems(folder: Path, part: int, problems: Sequence[Problem]) -> str:
    """Add the rows that a part leaves out; returns the SHA-256 of their lines.

    Raises:
        OutputError: the disk is full, or the file cannot be written.
    """
    lines = [json_bytes(problem.as_json(part=part)) for problem in problems]
    if lines:
        append_lines(folder / ERRORS, lines)
    return digest_of(lines)


def digest_of(lines: Iterable[bytes]) -> str:
    """The SHA-256 of lines, in hexadecimal."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line + b"\n")
    return digest.hexdigest()


def digests(folder: Path) -> dict[int, str]:
    """For each part that the file names: the SHA-256 of its lines, in their order."""
    found: dict[int, hashlib._Hash] = {}
    path = folder / ERRORS
    if path.is_file():
        with open(path, "rb") as file:
            for line in file:
                found.setdefault(_part_of(line), hashlib.sha256()).update(line)
    return {part: digest.hexdigest() for part, digest in found.items()}


def keep_problems_of(folder: Path, parts: Mapping[int, object]) -> None:
    """Drop all lines but those of finished parts, and put these in the parts' order."""
    path = folder / ERRORS
    if not path.is_file() or _is_clean(path, parts):
        return
    kept: dict[int, list[bytes]] = {}
    with open(path, "rb") as file:
        for line in file:
            if (part := _part_of(line)) in parts:
                kept.setdefault(part, []).append(line)
    with replacing(path) as file:
        for part in sorted(kept):
            file.writelines(kept[part])


def _is_clean(path: Path, parts: Mapping[int, object]) -> bool:
    last = -1
    with open(path, "rb") as file:
        for line in file:
            part = _part_of(line)
            if part not in parts or part < last:
                return False
            last = part
    return True


def _part_of(line: bytes) -> int:
    """The part that a line is of; -1 for one that is torn, which is of none."""
    value = json_object(line) if line.endswith(b"\n") else None
    part = (value or {}).get("part")
    return part if type(part) is int else -1
