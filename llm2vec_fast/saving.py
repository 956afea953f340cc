"""A saved model appears whole or not at all, as far as the file system allows."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# What an earlier save may have left in the folder: read beside the new weights, it would change what is loaded.
_STALE = (
    "model*.safetensors",
    "model*.safetensors.index.json",
    "adapter_model.safetensors",
    "adapter_config.json",
    "chat_template.jinja",
)


@contextmanager
def written_beside(target: str | Path) -> Iterator[Path]:
    """A new folder beside ``target`` to write into, put in its place at the end and removed if the body fails.

    Where ``target`` does not exist yet that is one rename. An existing folder keeps its other files: the new ones are
    moved in one by one, each by a rename, and weights of an earlier save that were not replaced are removed.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    beside.chmod(0o777 & ~_umask())
    try:
        yield beside
        for path in filter(Path.is_file, beside.rglob("*")):
            path.chmod(0o666 & ~_umask())  # safetensors writes files that nobody else may read
        if not target.exists():
            beside.rename(target)
            return
        new = {path.name for path in beside.iterdir()}
        for path in beside.iterdir():
            _replace(path, target / path.name)
        for path in {stale for pattern in _STALE for stale in target.glob(pattern)}:
            if path.name not in new:
                path.unlink()
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write one JSON object, indented, with a final newline."""
    path.write_text(json.dumps(content, indent=4, ensure_ascii=False) + "\n", encoding="utf-8")


def keep_published_name(folder: Path, checkpoint: str) -> None:
    """Note in the saved config.json which checkpoint it came from, as its prompt template is looked up by that name."""
    path = folder / "config.json"
    if path.is_file():
        content = json.loads(path.read_text(encoding="utf-8"))
        write_json(path, {**content, "_name_or_path": checkpoint})


def _replace(source: Path, target: Path) -> None:
    if source.is_dir():
        if target.is_dir():
            shutil.rmtree(target)
        source.rename(target)
    else:
        os.replace(source, target)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
