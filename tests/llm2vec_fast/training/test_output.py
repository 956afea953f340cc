"""A checkpoint holds what trains; what was merged under it is named, and missed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from reference_data import FOLDER, assert_matches
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llm2vec_fast import LLM2Vec, make_bidirectional
from llm2vec_fast.errors import ModelLoadError
from llm2vec_fast.loading.files import ADAPTERS_BELOW
from llm2vec_fast.training.arguments import MntpArguments, SimcseArguments
from llm2vec_fast.training.mntp import MntpTrainer
from llm2vec_fast.training.models import load_model
from llm2vec_fast.training.simcse import train_simcse

Settings = Callable[..., dict[str, object]]
TEXTS = ["rain fell over old walls", "a cat"]


def adapter_with(folder: Path, rank_of_queries: int | None = None, **changes: object) -> str:
    """The reference adapter with another configuration, its query projections cut to a rank."""
    shutil.copytree(FOLDER / "llama-lora", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    if rank_of_queries is not None:
        changes["rank_pattern"] = {"q_proj": rank_of_queries}
        weights = load_file(folder / "adapter_model.safetensors")
        for name, x in weights.items():
            if "q_proj" in name:
                weights[name] = (x[:rank_of_queries] if "lora_A" in name else x[:, :rank_of_queries]).contiguous()
        save_file(weights, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    return str(folder)


def embeddings(adapter: str) -> np.ndarray:
    encoder = LLM2Vec.from_pretrained(FOLDER / "llama", adapter, dtype="float32", device="cpu")
    return encoder.encode(TEXTS, convert_to_numpy=True)


def test_a_checkpoint_is_refused_without_the_adapters_that_were_under_it(settings: Settings, tmp_path: Path) -> None:
    """Alone it would load, to vectors without what they added."""
    adapter = adapter_with(tmp_path / "adapter", base_model_name_or_path=str(FOLDER / "llama"))
    given = {"max_steps": 2, "save_steps": 2, "peft_model_name_or_path": [adapter]}
    train_simcse(SimcseArguments(**settings(**given)))
    checkpoint, trained = str(tmp_path / "out" / "checkpoint-2"), embeddings(str(tmp_path / "out"))
    (tmp_path / "moved").mkdir()
    moved = shutil.copytree(checkpoint, tmp_path / "moved" / "weights")
    for place in (checkpoint, str(moved)):
        needs = f"{place} is a checkpoint of a run with {adapter} merged into its base, and here there is none"
        with pytest.raises(ModelLoadError, match=needs):
            embeddings(place)
        with pytest.raises(ModelLoadError, match=needs):
            LLM2Vec.from_pretrained(place, device="cpu")
        for later in ({}, {"continue_adapter": True}):
            with pytest.raises(ModelLoadError, match=needs):
                load_model(SimcseArguments(**settings("next", peft_model_name_or_path=[place], **later)), head=False)
    other = adapter_with(tmp_path / "other", rank_of_queries=2)
    with pytest.raises(ModelLoadError, match=f"and here there is {other}: "):
        load_model(SimcseArguments(**settings("next", peft_model_name_or_path=[other, checkpoint])), head=False)
    whole = LLM2Vec.from_pretrained(adapter, checkpoint, dtype="float32", device="cpu")
    assert_matches(whole.encode(TEXTS, convert_to_numpy=True), trained)
    given |= {"peft_model_name_or_path": [adapter, checkpoint], "continue_adapter": True}
    train_simcse(SimcseArguments(**settings("on", **given, learning_rate=0.0)))
    assert_matches(embeddings(str(tmp_path / "on")), trained)
    later = tmp_path / "on" / "checkpoint-2"
    with pytest.raises(ModelLoadError, match=f"a run with {adapter} merged"):
        embeddings(str(later))
    assert not (tmp_path / "out" / ADAPTERS_BELOW).exists()  # the encoder holds them all
    (later / ADAPTERS_BELOW).write_text('{"merged": 3}')
    with pytest.raises(ModelLoadError, match=f"{later}/{ADAPTERS_BELOW} does not name adapters"):
        embeddings(str(later))


def test_a_trainer_saves_checkpoints_of_a_model_that_its_caller_made(settings: Settings, tmp_path: Path) -> None:
    model = make_bidirectional(AutoModelForCausalLM.from_pretrained(FOLDER / "llama"))
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    arguments = MntpArguments(**settings(max_steps=1, save_steps=1))
    ids = torch.arange(5, 15)[None]
    batch = {"input_ids": ids, "labels": ids.clone(), "position_ids": torch.arange(10)[None]}
    MntpTrainer(model, arguments, train_dataset=[{}], data_collator=lambda _: dict(batch)).train()
    saved = tmp_path / "out" / "checkpoint-1"
    assert (saved / "adapter_model.safetensors").exists()
    assert not (saved / ADAPTERS_BELOW).exists()
