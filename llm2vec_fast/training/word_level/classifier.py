"""The linear head, alone for training and with its encoder for use."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from llm2vec_fast.encoder import LLM2Vec
from llm2vec_fast.errors import ModelLoadError
from llm2vec_fast.saving import write_json, written_beside

from .features import embed_words

HEAD, SETTINGS = "head.safetensors", "word_level_config.json"


class Head(nn.Module):
    """Dropout, then scores of the labels: (words, d) → (words, labels)."""

    def __init__(self, dimension: int, labels: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(dimension, labels)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear(self.dropout(features))


class WordClassifier:
    """Labels words.

    Args:
        encoder: the frozen encoder.
        head: its head.
        labels: their names, a column of the head each.
        label_from: see `WordLevelArguments.retroactive_labels`.
    """

    def __init__(self, encoder: LLM2Vec, head: Head, labels: Sequence[str], label_from: str) -> None:
        self.encoder, self.head, self.labels, self.label_from = encoder, head.eval(), list(labels), label_from

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> WordClassifier:
        """What `llm2vec-fast train word-level` wrote; ``options`` go to `LLM2Vec.from_pretrained`.

        Raises:
            ModelLoadError: the folder is not such a one, or its encoder cannot be loaded.
        """
        try:
            settings = json.loads((Path(folder) / SETTINGS).read_text(encoding="utf-8"))
            with safe_open(Path(folder) / HEAD, framework="pt") as file:
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except OSError as error:
            raise ModelLoadError(f"{folder} holds no word-level head ({error}): train one into it first") from error
        encoder = LLM2Vec.from_pretrained(**settings["encoder"], **options)
        head = Head(weights["linear.weight"].shape[1], len(settings["labels"]))
        head.load_state_dict(weights)
        return cls(encoder, head, settings["labels"], settings["retroactive_labels"])

    @torch.no_grad()
    def predict(self, sentences: Sequence[Sequence[str]]) -> list[list[str | None]]:
        """The label of every word of sentences given as words; None beyond the encoder's limit."""
        found = []
        for features in embed_words(self.encoder, sentences, self.label_from):
            rows = torch.from_numpy(features)
            best = self.head(rows).argmax(1).tolist()
            seen = (~rows.isnan().any(1)).tolist()
            found.append([self.labels[i] if known else None for i, known in zip(best, seen, strict=True)])
        return found


def save_head(head: Head, labels: Sequence[str], label_from: str, encoder: dict[str, Any], target: Path) -> None:
    """Write head and settings, whole or not at all; ``encoder`` is what `LLM2Vec.from_pretrained` is given."""
    with written_beside(target) as folder:
        save_file({name: x.detach().cpu().contiguous() for name, x in head.state_dict().items()}, folder / HEAD)
        settings = {"labels": list(labels), "retroactive_labels": label_from, "encoder": encoder}
        write_json(folder / SETTINGS, settings)
