"""Whether a job goes on as it began: the refusal of another job, and sentences about what differs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm2vec_fast.errors import ChangedError

SHOWN_CHANGES = 5


def changed_error(folder: Path, changes: Sequence[str]) -> ChangedError:
    """The refusal to mix two jobs in a folder."""
    return ChangedError(
        f"{folder} was started with something else: {listed(changes)}; go on with what it was, or give a new --output"
    )


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two descriptions, as "name old -> new"."""
    names = [*before, *(name for name in now if name not in before)]
    return [f"{name} {before.get(name)} -> {now.get(name)}" for name in names if before.get(name) != now.get(name)]


def listed(changes: Sequence[str]) -> str:
    """The first few of them, and how many there are beside those."""
    more = f"; and {len(changes) - SHOWN_CHANGES} more" if len(changes) > SHOWN_CHANGES else ""
    return "; ".join(changes[:SHOWN_CHANGES]) + more
