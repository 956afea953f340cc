"""Adapters under an adapter: one that was trained on a base with others merged into it is wrong on the base alone.

What a stage writes at its end holds those others' work. A checkpoint on the way does not: beside it a file names them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from llm2vec_fast.errors import ModelLoadError

from .files import ADAPTER_WEIGHTS, ADAPTERS_BELOW, Source

_NAME, _DIGEST = "name", "sha256"


def write_below(folder: Path, below: Sequence[Source]) -> None:
    """Name in an adapter's folder the adapters that were merged under it, in order, by path and by their weights."""
    found = [{_NAME: source.name if source.commit else str(source.place.absolute())} for source in below]
    for entry, source in zip(found, below, strict=True):
        entry[_DIGEST] = _digest(source)
    (folder / ADAPTERS_BELOW).write_text(json.dumps({"merged": found}, indent=1), encoding="utf-8")


def require_below(adapter: Source, below: Sequence[Source]) -> None:
    """Refuse an adapter where others are under it than were while it was trained.

    Args:
        adapter: what is to be put on.
        below: what is merged into the base before, in order.

    Raises:
        ModelLoadError: it names them.
    """
    listed = (adapter.json(ADAPTERS_BELOW) or {}).get("merged")
    if listed is None:
        return
    if not isinstance(listed, list) or not all(isinstance(x, dict) and {_NAME, _DIGEST} <= x.keys() for x in listed):
        raise ModelLoadError(f"{adapter.name}/{ADAPTERS_BELOW} does not name adapters: restore it")
    if [x[_DIGEST] for x in listed] != [_digest(source) for source in below]:
        there = " and ".join(source.name for source in below)
        raise ModelLoadError(
            f"the adapter {adapter.name} is a checkpoint of a run with {' and '.join(str(x[_NAME]) for x in listed)} "
            f"merged into its base, and here there is {there or 'none'}: load what that run writes at its end, or give "
            f"those first; where the base holds them already, remove {ADAPTERS_BELOW} from the checkpoint"
        )


def _digest(adapter: Source) -> str | None:
    weights = adapter.file(ADAPTER_WEIGHTS)
    return None if weights is None else hashlib.sha256(weights.read_bytes()).hexdigest()
