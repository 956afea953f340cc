"""Whether a job goes on as it began: the refusal of another job, and the libraries that decide the numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from llm2vec_fast.errors import ChangedError

LIBRARIES = ("llm2vec-fast", "torch", "triton", "transformers", "tokenizers", "peft", "numpy", "pyarrow")
SHOWN_CHANGES = 5


def changed_error(folder: Path, changes: Sequence[str]) -> ChangedError:
    """The refusal to mix two jobs in a folder."""
    shown = "; ".join(changes[:SHOWN_CHANGES])
    more = f"; and {len(changes) - SHOWN_CHANGES} more" if len(changes) > SHOWN_CHANGES else ""
    return ChangedError(
        f"{folder} was started with something else: {shown}{more}; go on with what it was, or give a new --output"
    )


def library_versions() -> dict[str, str | None]:
    """Versions of the libraries that decide the numbers; None where one is not installed."""
    found: dict[str, str | None] = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def other_versions(before: Mapping[str, str | None]) -> list[str]:
    """Libraries that are not of the version they were of ``before``, as "name old -> new"."""
    now = library_versions()
    return [f"{name} {old} -> {now.get(name)}" for name, old in before.items() if now.get(name) != old]
