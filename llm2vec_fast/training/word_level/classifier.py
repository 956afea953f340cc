"""The linear head, alone for training and with its encoder for use."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from llm2vec_fast.encoder import LLM2Vec
from llm2vec_fast.errors import ModelLoadError
from llm2vec_fast.saving import write_json, written_beside

from .arguments import LABEL_FROM
from .features import embed_words

HEAD, SETTINGS = "head.safetensors", "word_level_config.json"


# What a downloaded head may say of its encoder. Whether code is run, and from where, is the caller's to say alone.
_ENCODER: dict[str, tuple[type, ...]] = {
    "base_model_name_or_path": (str,),
    "peft_model_name_or_path": (str, type(None)),
    "revision": (str, type(None)),
    "enable_bidirectional": (bool,),
    "merge_peft": (bool,),
    "max_length": (int,),
    "doc_max_length": (int,),
}


def _checked(settings: Any, path: Path) -> dict[str, Any]:
    """The settings of a head, if they are such.

    Raises:
        ModelLoadError: they hold something else; the message says what.
    """
    encoder = settings.get("encoder") if isinstance(settings, dict) else None
    if not isinstance(encoder, dict) or not isinstance(encoder.get("base_model_name_or_path"), str):
        raise ModelLoadError(f"{path} names no encoder: train a head into the folder first")
    for name, value in encoder.items():
        if name not in _ENCODER:
            raise ModelLoadError(
                f"{path} has {name}={value!r} for its encoder, which such a file may not say: if you want it, delete "
                "it there and pass it to from_pretrained"
            )
        if not isinstance(value, _ENCODER[name]) or (isinstance(value, bool) and bool not in _ENCODER[name]):
            raise ModelLoadError(f"{path} has {name}={value!r} for its encoder: that is damaged")
    labels, label_from = settings.get("labels"), settings.get("retroactive_labels")
    if not isinstance(labels, list) or not labels or not all(isinstance(label, str) for label in labels):
        raise ModelLoadError(f"{path} has no list of labels")
    if label_from not in LABEL_FROM:
        raise ModelLoadError(f"{path} has retroactive_labels={label_from!r}, which is none of {', '.join(LABEL_FROM)}")
    return settings


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
        folder = Path(folder).expanduser()
        try:
            settings = _checked(json.loads((folder / SETTINGS).read_text(encoding="utf-8")), folder / SETTINGS)
            with safe_open(folder / HEAD, framework="pt") as file:
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ModelLoadError(f"{folder} holds no word-level head ({reason}): train one into it first") from error
        encoder = LLM2Vec.from_pretrained(**{**settings["encoder"], **options})
        head = Head(encoder.dimension, len(settings["labels"]))
        try:
            head.load_state_dict(weights)
        except RuntimeError as error:
            raise ModelLoadError(
                f"the word-level head of {folder} does not fit its encoder of {encoder.dimension} columns and "
                f"{len(settings['labels'])} labels: train one for it"
            ) from error
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
