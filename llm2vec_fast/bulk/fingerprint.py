"""What identifies a model: SHA-256 of the files that decide its embeddings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llm2vec_fast.adapters import adapter_source
from llm2vec_fast.errors import ModelLoadError
from llm2vec_fast.jobs.files import sha256_of

SETTINGS = "llm2vec_config.json"  # what LLM2Vec.save writes beside the weights
WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "*.gguf", "config.json", SETTINGS)
TOKENIZER_PATTERNS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
)
ADAPTER_PATTERNS = ("adapter_config.json", "adapter_model*", SETTINGS)
DOWNLOADED = [*WEIGHT_PATTERNS, *TOKENIZER_PATTERNS, *ADAPTER_PATTERNS]


def locate(model: str) -> Path:
    """The folder or file of ``model``: a path, or a name on the Hugging Face hub, fetched there if not yet cached.

    Raises:
        ModelLoadError: there is no such path, and the hub knows no such name or cannot be reached.
    """
    path = Path(model).expanduser()
    if path.exists():
        return path
    if path.is_absolute() or model.count("/") != 1 or model.startswith("."):
        raise ModelLoadError(f"model {model} does not exist: give a model folder, a GGUF file or a hub name")
    from huggingface_hub import snapshot_download

    for offline in (True, False):
        try:
            return Path(snapshot_download(model, allow_patterns=DOWNLOADED, local_files_only=offline))
        except Exception as error:  # the hub client raises many unrelated classes
            failure = error
    reason = str(failure).splitlines()[0] if str(failure) else type(failure).__name__
    raise ModelLoadError(f"model {model} is no folder here and cannot be fetched from the hub: {reason}") from failure


def fingerprint(model: str, adapter: str | None, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Names, sizes and SHA-256 of the model's, the tokenizer's and the adapter's files.

    ``known`` is an earlier fingerprint: files of the same path, size and modification time are not read again.

    Returns:
        {"model": {"path", "sha256", "files": [{"path", "bytes", "modified_ns", "sha256"}]}, "tokenizer": …,
        "adapter": … or None}

    Raises:
        ModelLoadError: the model or the adapter does not exist.
    """
    hashes = {_key(file): file["sha256"] for part in (known or {}).values() if part for file in part["files"]}
    places = [locate(model)]
    base = _base_of(places[0])
    if base is not None:
        places.append(locate(base))
    return {
        "model": _describe(places, WEIGHT_PATTERNS + ADAPTER_PATTERNS, hashes),
        "tokenizer": _describe(places, TOKENIZER_PATTERNS, hashes),
        "adapter": _describe([locate(adapter_source(adapter))], ADAPTER_PATTERNS, hashes) if adapter else None,
    }


def _base_of(place: Path) -> str | None:
    """The base that a model folder names, where the folder holds an adapter alone."""
    path = place / "adapter_config.json"
    if not path.is_file() or (place / "config.json").is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelLoadError(f"{path} is not valid JSON: {error}") from error


def _describe(places: Sequence[Path], patterns: Iterable[str], hashes: Mapping[tuple[Any, ...], str]) -> dict[str, Any]:
    files = []
    digest = hashlib.sha256()
    for path in _files(places, patterns):
        status = path.stat()
        file = {"path": str(path.absolute()), "bytes": status.st_size, "modified_ns": status.st_mtime_ns}
        file["sha256"] = hashes.get(_key(file)) or sha256_of(path)
        files.append(file)
        name = "" if path in places else path.name  # a file given by itself is the same model under any name
        digest.update(f"{name} {file['sha256']}\n".encode())
    return {"path": str(places[0].absolute()), "sha256": digest.hexdigest(), "files": files}


def _files(places: Sequence[Path], patterns: Iterable[str]) -> list[Path]:
    found = []
    for place in places:
        matches = {place} if place.is_file() else {path for pattern in patterns for path in place.glob(pattern)}
        found += sorted(path for path in matches if path.is_file())
    return found


def _key(file: Mapping[str, Any]) -> tuple[Any, ...]:
    return file["path"], file["bytes"], file["modified_ns"]
