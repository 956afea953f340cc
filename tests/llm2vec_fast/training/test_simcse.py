"""SimCSE: the loss of two differing views, whatever cuts the batch up, and an encoder that holds all stages' work."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numerics import assert_error_within
from reference_data import FOLDER
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy, normalize

from llm2vec_fast.data.pairs import identity
from llm2vec_fast.errors import ModelLoadError, UserError
from llm2vec_fast.kernels.layout import SequenceLayout
from llm2vec_fast.training.arguments import SimcseArguments
from llm2vec_fast.training.contrast import ContrastiveTrainer, load_embedding_model
from llm2vec_fast.training.simcse import SimcseCollator, train_simcse

Settings = Callable[..., dict[str, object]]
TEXTS = ["the cat sat on a mat", "rain", "old stone walls near our quiet river", "the rain fell over the river"]


def test_the_loss_is_the_cross_entropy_of_cosines_between_the_views(settings: Settings) -> None:
    arguments = SimcseArguments(**settings(attention_dropout=0.3, lora_dropout=0.0))
    stage, tokenizer = load_embedding_model(arguments)
    trainer = ContrastiveTrainer(stage, arguments, [60], train_dataset=TEXTS)
    batch = SimcseCollator(tokenizer)([{"text": text, "row": i} for i, text in enumerate(TEXTS)])
    stage.model.train()
    rows = SequenceLayout.from_lengths(batch["lengths"])
    torch.manual_seed(3)
    loss = trainer.compute_loss(stage.model, dict(batch))
    torch.manual_seed(3)
    embedded = stage.model(input_ids=batch["input_ids"], layout=rows, skip=batch["skip"], embed=True)
    first, second = normalize(embedded.rows.double(), dim=-1).chunk(2)
    exact = cross_entropy(20.0 * first @ second.T, torch.arange(len(TEXTS)))
    plain = cross_entropy(20.0 * first.float() @ second.float().T, torch.arange(len(TEXTS)))
    assert_error_within(loss.detach(), plain.detach(), exact.detach(), name="loss")
    assert ((first - second).abs().amax(1) > 1e-4).all()  # other dropout in each view of each text


def test_accumulated_steps_are_one_large_batch(settings: Settings) -> None:
    arguments = SimcseArguments(**settings(per_device_train_batch_size=4, gradient_accumulation_steps=8))
    assert arguments.per_device_train_batch_size == 32
    assert arguments.gradient_accumulation_steps == 1
    assert arguments.token_budget == 4 * 24


def test_training_lowers_the_loss_and_shows_speed_and_memory(settings: Settings, corpus: str, tmp_path: Path) -> None:
    train_simcse(SimcseArguments(**settings(max_steps=12, validation_file=[corpus], scale=5.0)))
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    lines = [line for line in history if "loss" in line]
    assert np.mean([line["loss"] for line in lines[-3:]]) < np.mean([line["loss"] for line in lines[:3]])
    assert all(line["train_tokens_per_second"] > 0 and line["peak_memory_mib"] > 0 for line in lines)
    whole = json.loads((tmp_path / "out" / "train_results.json").read_text())
    assert whole["train_tokens_per_second"] == lines[-1]["train_tokens_per_second"]
    assert whole["peak_memory_mib"] >= lines[-1]["peak_memory_mib"]
    assert json.loads((tmp_path / "out" / "eval_results.json").read_text())["eval_loss"] > 0
    assert json.loads((tmp_path / "out" / "llm2vec_config.json").read_text())["pooling_mode"] == "mean"


def test_an_adapter_of_another_base_is_refused(settings: Settings, tmp_path: Path) -> None:
    wide = tmp_path / "wide"
    wide.mkdir()
    weights = load_file(FOLDER / "llama-lora" / "adapter_model.safetensors")
    save_file({name: torch.cat([x, x], dim=-1) if "lora_A" in name else x for name, x in weights.items()},
              wide / "adapter_model.safetensors")  # fmt: skip
    (wide / "adapter_config.json").write_text((FOLDER / "llama-lora" / "adapter_config.json").read_text())
    with pytest.raises(ModelLoadError, match=r"the adapter .*wide does not fit this base") as caught:
        train_simcse(SimcseArguments(**settings(peft_model_name_or_path=[str(wide)])))
    assert "\n" not in str(caught.value)


def test_repeated_texts_are_told(settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each of 12 texts twice: of 24 · 23 pairs, 24. And one text alone, which leaves no step a negative."""
    for name, texts in (("twice", [f"a cat {i}" for i in range(12)] * 2), ("same", ["a cat"] * 8)):
        file = tmp_path / f"{name}.txt"
        file.write_text("\n".join(texts) + "\n")
        train_simcse(SimcseArguments(**settings(name, train_file=[str(file)], max_steps=1, save_strategy="no")))
    assert "twice.txt: 4.3 % of the pairs of a query and another row's document" in caplog.text
    assert "same.txt: 100.0 % of the pairs" in caplog.text
    assert caplog.text.count("step 1 teaches nothing, its loss is 0") == 1


def test_equal_texts_are_one_thing() -> None:
    assert identity("a  cat\n") == identity("a cat")
    assert identity("a cat") != identity("a Cat")
    assert -(2**63) <= identity("x") < 2**63


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"per_device_train_batch_size": 61},
            "a batch takes 61 rows and the largest training file has 60",
        ),
        ({"train_file": ["{tmp}/other.jsonl"]}, "other.jsonl has no column 'text' .text_column.: its"),
        ({"train_file": ["{tmp}/empty.txt"]}, "empty.txt has no text in column 'text'"),
        ({"lora_target_modules": ["q_projj"]}, "lora_target_modules=q_projj does not fit LlamaModel"),
        ({"matryoshka_dims": [16, 128]}, "matryoshka_dims has 128 and the model has 64 dimensions"),
    ],
)
def test_what_does_not_fit_the_data_or_the_model_is_refused(
    settings: Settings, tmp_path: Path, changes: dict, message: str
) -> None:
    (tmp_path / "other.jsonl").write_text('{"words": "a cat"}\n')
    (tmp_path / "empty.txt").write_text(" \n\n")
    if "train_file" in changes:
        changes = {"train_file": [name.format(tmp=tmp_path) for name in changes["train_file"]]}
    with pytest.raises(UserError, match=message):
        train_simcse(SimcseArguments(**settings(**changes)))
