"""Configurations of earlier times load as what they mean."""

from __future__ import annotations

import json
import shutil

import torch
from reference_data import FOLDER, TEXTS
from tiny_models import tiny_model

from llm2vec_fast import LLM2Vec

FACTORS = {"short_factor": [1.1] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0]}
ROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 32, **FACTORS}


def load(place) -> LLM2Vec:
    return LLM2Vec.from_pretrained(place, dtype="float32", device="cpu")


def test_the_first_name_of_longrope_is_understood(tmp_path):
    folder = tmp_path / "model"
    model = tiny_model("phi3", vocab_size=384, rope_parameters=ROPE, original_max_position_embeddings=32)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(FOLDER / "llama" / name, folder / name)
    texts = [*TEXTS, " ".join(TEXTS) * 2]  # the last is beyond the original context
    now = load(folder).encode(texts)
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"]
    old = {"rope_scaling": {"type": "su", **FACTORS}, "rope_theta": 10000.0}
    (folder / "config.json").write_text(json.dumps({**config, **old}))
    encoder = load(folder)
    assert torch.equal(encoder.encode(texts), now)
    encoder.save(tmp_path / "saved")
    assert torch.equal(load(tmp_path / "saved").encode(texts), now)
