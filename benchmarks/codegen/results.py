"""What was compiled is kept: it is compiled again only where its machine code, or how that is read, may differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path
from typing import Any

import triton

from benchmarks.codegen import compiling, rows, sass
from benchmarks.codegen.compiling import Variant, options_of, source_of
from benchmarks.codegen.report import Entry
from benchmarks.codegen.rows import Row
from benchmarks.codegen.variants import Recorded, variants_of


class Results:
    """Rows by Triton release, chip and name, kept in a JSON file where one is given; other releases' rows stay."""

    def __init__(self, path: Path | None, figures: Sequence[Recorded]) -> None:
        self._path = path
        self._figures = figures
        self._entries: dict[tuple[str, str, str], Entry] = {}
        if path is not None and path.exists():
            for found in json.loads(path.read_text())["rows"]:
                self._put(_entry(found))

    def known(self, variant: Variant, architecture: str) -> Row | None:
        """The row of a kernel that would come out the same."""
        entry = self._entries.get((triton.__version__, architecture, variant.name))
        return entry.row if entry is not None and entry.digest == digest_of(variant, architecture) else None

    def add(self, family: str, variant: Variant, row: Row) -> None:
        """Keep a row."""
        self._put(Entry(family, triton.__version__, digest_of(variant, row.architecture), row))

    def forget_all_but(self, family: str, architecture: str, names: Iterable[str]) -> None:
        """Drop what a family no longer has, in this release of Triton."""
        names = set(names)
        for key, entry in list(self._entries.items()):
            if key[:2] == (triton.__version__, architecture) and entry.family == family and key[2] not in names:
                del self._entries[key]

    def entries(self) -> list[Entry]:
        """The newest Triton first, then by family, chip, and as the family lists its kernels."""

        def place(entry: Entry) -> tuple[Any, ...]:
            release = tuple(-int(part) for part in entry.triton.split(".")[:3])
            return release, entry.family, *_place(entry.family, entry.row.architecture, entry.row.name)

        return sorted(self._entries.values(), key=place)

    def save(self) -> None:
        """Write the file, where there is one."""
        if self._path is not None:
            found = [_record(entry) for entry in self.entries()]
            _write(self._path, {"rows": found, "recorded": [asdict(figure) for figure in self._figures]})

    def _put(self, entry: Entry) -> None:
        self._entries[entry.triton, entry.row.architecture, entry.row.name] = entry


def _write(path: Path, tables: dict[str, list[dict[str, Any]]]) -> None:
    """Each record on a line of its own, so that changes are read by row; written beside, then renamed."""
    parts = [
        f"{json.dumps(name)}: [\n" + ",\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n]"
        for name, records in tables.items()
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    beside.write_text("{\n" + ",\n".join(parts) + "\n}\n")
    beside.replace(path)


def digest_of(variant: Variant, architecture: str) -> str:
    """Changes with the kernel's source, what it is launched with, the compiler, and how machine code is read."""
    parts = (source_of(variant).hash(), options_of(variant), architecture, triton.__version__, _reading())
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _place(family: str, architecture: str, name: str) -> tuple[int, int]:
    names = _names(family, architecture)
    return list(compiling.TARGETS).index(architecture), names.index(name) if name in names else len(names)


@cache
def _names(family: str, architecture: str) -> list[str]:
    return [variant.name for variant in variants_of(family, architecture, main_only=False)]


@cache
def _reading() -> str:
    return hashlib.sha256(b"".join(Path(x.__file__).read_bytes() for x in (compiling, rows, sass))).hexdigest()


def _record(entry: Entry) -> dict[str, Any]:
    """An entry and its row as one record, without the figures that such a kernel does not have."""
    figures = {name: value for name, value in asdict(entry.row).items() if value is not None}
    return {"family": entry.family, "triton": entry.triton, "digest": entry.digest, **figures}


def _entry(found: dict[str, Any]) -> Entry:
    row = Row(**{field.name: found[field.name] for field in fields(Row) if field.name in found})
    return Entry(found["family"], found["triton"], found["digest"], row)
