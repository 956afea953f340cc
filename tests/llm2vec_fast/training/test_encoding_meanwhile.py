"""A model in training may be encoded with between two steps, as a callback that evaluates it does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from reference_data import FOLDER
from safetensors.torch import load_file
from transformers import AutoTokenizer, TrainerCallback

from llm2vec_fast import LLM2Vec, accelerate
from llm2vec_fast.acceleration import restore
from llm2vec_fast.training import ContrastiveArguments, SimcseArguments, train_contrastive, train_simcse

TEXTS = ["rain fell over the river", "old stone walls"]
STAGES = {"simcse": (SimcseArguments, train_simcse), "contrastive": (ContrastiveArguments, train_contrastive)}


class Encode(TrainerCallback):
    """Encodes after each step, and accelerates and restores the model as a user may."""

    def __init__(self) -> None:
        self.rows: list[torch.Tensor] = []

    def on_step_end(self, args, state, control, model=None, **_):
        encoder = LLM2Vec(model, AutoTokenizer.from_pretrained(FOLDER / "llama"))
        self.rows.append(encoder.encode(TEXTS))
        assert torch.equal(self.rows[-1], encoder.encode(TEXTS))  # without dropout
        assert model.training
        accelerate(model)
        restore(model)


@pytest.mark.parametrize("name", STAGES)
def test_the_training_goes_on_as_without(
    name: str, settings: Callable[..., dict[str, object]], files: dict[str, str], tmp_path: Path
) -> None:
    """Dropout draws the same numbers, and the weights end the same, bit by bit."""
    (arguments, train), encode = STAGES[name], Encode()
    for output, callbacks in (("plain", []), ("encoding", [encode])):
        changes = {"train_file": [files[name]], "lora_dropout": 0.2, "save_strategy": "no"}
        train(arguments(**settings(output, **changes)), callbacks=callbacks)
    assert len(encode.rows) == 4
    assert not torch.equal(encode.rows[0], encode.rows[-1])  # each sees the weights of its step
    expected, found = (load_file(tmp_path / x / "adapter_model.safetensors") for x in ("plain", "encoding"))
    assert found.keys() == expected.keys()
    for weight in expected:
        assert torch.equal(found[weight], expected[weight]), weight
