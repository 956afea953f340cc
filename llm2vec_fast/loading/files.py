"""The files that loading reads: their names, the sources that hold them, and JSON that was written by others."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm2vec_fast.errors import ModelLoadError

CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTERS_BELOW = "adapters_below.json"  # of a checkpoint, where adapters were merged into its base
SETTINGS_FILE = "llm2vec_config.json"
MODULES = "modules.json"  # of sentence-transformers
INDEX = "model.safetensors.index.json"

# Loading reads nothing that is not named here. What is fetched from a hub and what a fingerprint covers are taken from
# these, so that neither can miss a file that decides embeddings.
ADAPTER_PATTERNS = (ADAPTER_CONFIG, ADAPTERS_BELOW, "adapter_model*", SETTINGS_FILE)
WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json", CONFIG, *ADAPTER_PATTERNS)
TOKENIZER_PATTERNS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
)
# Read, too, but of no effect on an embedding.
INERT_PATTERNS = (
    MODULES,
    "generation_config.json",
    "chat_template*",
    "processor_config.json",
    "preprocessor_config.json",
)
LOADED_PATTERNS = (*WEIGHT_PATTERNS, *TOKENIZER_PATTERNS, *INERT_PATTERNS)
CODE_PATTERNS = ("*.py",)


@dataclass(frozen=True)
class Source:
    """Where a model or an adapter is read from.

    Attributes:
        name: what it is called: the path given, or the name of its hub repository.
        place: its folder, or its GGUF file.
        commit: of a hub repository.
        revision: the one that was asked for, or the commit of a folder in a hub cache.
    """

    name: str
    place: Path
    commit: str | None = None
    revision: str | None = None

    @property
    def is_gguf(self) -> bool:
        return self.place.suffix.lower() == ".gguf"

    def file(self, name: str) -> Path | None:
        """One of its files, if it has it."""
        path = self.place / name
        return path if path.is_file() else None

    def files(self, patterns: tuple[str, ...]) -> list[Path]:
        """Its files of these patterns, sorted by name; a GGUF file is all in one."""
        if self.is_gguf:
            return [self.place]
        return sorted({path for pattern in patterns for path in self.place.glob(pattern) if path.is_file()})

    def json(self, name: str) -> dict[str, Any] | None:
        """The content of a JSON file; None without that file.

        Raises:
            ModelLoadError: it is not valid, or no object.
        """
        path = None if self.is_gguf else self.file(name)
        return None if path is None else json_of(path)

    @property
    def is_adapter(self) -> bool:
        return not self.is_gguf and self.file(ADAPTER_CONFIG) is not None


def json_of(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ModelLoadError: the file is not valid, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelLoadError(f"{path} is not valid JSON: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise ModelLoadError(f"{path} holds a {type(content).__name__}, not a JSON object")
    return content


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
