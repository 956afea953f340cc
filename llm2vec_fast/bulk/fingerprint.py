"""What identifies a model: SHA-256 of the files that decide its embeddings."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm2vec_fast.jobs.files import sha256_of
from llm2vec_fast.loading.files import Source
from llm2vec_fast.loading.hub import HubOptions
from llm2vec_fast.loading.stack import resolve


def fingerprint(
    model: str, adapter: str | None, known: Mapping[str, Any] | None = None, hub: HubOptions | None = None
) -> dict[str, Any]:
    """Names, sizes and SHA-256 of the model's, the tokenizer's and the adapter's files.

    Which files those are is what loading itself answers (`loading.stack`): those of a base that an adapter names, and
    of the commit of a hub repository that is meant, are among them.

    Args:
        model, adapter: as `LLM2Vec.from_pretrained` takes them.
        known: an earlier fingerprint: files of the same path, size and modification time are not read again.
        hub: how the hub is read.

    Returns:
        {"model": {"path", "sha256", "files": [{"path", "bytes", "modified_ns", "sha256"}]}, "tokenizer": …,
        "adapter": … or None}

    Raises:
        ModelLoadError: the model or the adapter does not exist.
    """
    hashes = {_key(file): file["sha256"] for part in (known or {}).values() if part for file in part["files"]}
    stack = resolve(model, adapter, hub)
    files = stack.files()
    return {
        "model": _describe(stack.named, files["model"], hashes),
        "tokenizer": _describe(stack.named, files["tokenizer"], hashes),
        "adapter": None if stack.adapter is None else _describe(stack.adapter, files["adapter"], hashes),
    }


def _describe(source: Source, paths: Sequence[Path], hashes: Mapping[tuple[Any, ...], str]) -> dict[str, Any]:
    files = []
    digest = hashlib.sha256()
    for path in paths:
        status = path.stat()
        file = {"path": str(path.absolute()), "bytes": status.st_size, "modified_ns": status.st_mtime_ns}
        file["sha256"] = hashes.get(_key(file)) or sha256_of(path)
        files.append(file)
        name = "" if path.suffix.lower() == ".gguf" else path.name  # the same model under any name
        digest.update(f"{name} {file['sha256']}\n".encode())
    return {"path": str(source.place.absolute()), "sha256": digest.hexdigest(), "files": files}


def _key(file: Mapping[str, Any]) -> tuple[Any, ...]:
    return file["path"], file["bytes"], file["modified_ns"]
