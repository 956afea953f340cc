"""SimCSE: the loss of two differing views, whatever cuts the batch up, and an encoder that holds all stages' work."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numerics import GRADIENT_FACTOR, assert_error_within
from reference_data import FOLDER, assert_matches
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy, normalize
from training_runs import UNCLIPPED, assert_trained_alike

from llm2vec_fast import LLM2Vec
from llm2vec_fast.data.pairs import identity
from llm2vec_fast.errors import ModelLoadError, UserError
from llm2vec_fast.kernels.layout import SequenceLayout
from llm2vec_fast.training.arguments import SimcseArguments
from llm2vec_fast.training.contrast import ContrastiveTrainer, load_embedding_model
from llm2vec_fast.training.packing import pack
from llm2vec_fast.training.simcse import SimcseCollator, train_simcse

Settings = Callable[..., dict[str, object]]
TEXTS = ["the cat sat on a mat", "rain", "old stone walls near our quiet river", "the rain fell over the river"]


@pytest.fixture
def step(settings: Settings) -> Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Loss and gradients of one batch of TEXTS."""

    def step(**changes: object) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        arguments = SimcseArguments(**settings(lora_dropout=0.0, **changes))
        stage, tokenizer = load_embedding_model(arguments)
        with torch.no_grad():
            for name, x in stage.model.named_parameters():
                if "lora_B" in name:  # zero at first, with which lora_A would get no gradient
                    x.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
        trainer = ContrastiveTrainer(stage, arguments, [60], train_dataset=TEXTS)
        batch = SimcseCollator(tokenizer)([{"text": text, "row": i} for i, text in enumerate(TEXTS)])
        stage.model.train()
        if arguments.gradient_checkpointing:
            stage.model.gradient_checkpointing_enable()
        torch.manual_seed(3)
        loss = trainer.compute_loss(stage.model, batch)
        loss.backward()
        return loss.detach(), {name: x.grad for name, x in stage.model.named_parameters() if x.grad is not None}

    return step


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


def test_without_dropout_the_embeddings_are_those_of_the_encoder(settings: Settings) -> None:
    arguments = SimcseArguments(**settings(attention_dropout=0.3))
    stage, tokenizer = load_embedding_model(arguments)
    batch = pack(tokenizer, [("", text) for text in TEXTS], views=2)
    stage.model.eval()
    with torch.no_grad():
        rows = stage.model(
            input_ids=batch["input_ids"],
            layout=SequenceLayout.from_lengths(batch["lengths"]),
            skip=batch["skip"],
            embed=True,
        ).rows
    encoder = LLM2Vec.from_pretrained(FOLDER / "llama", dtype="float32", device="cpu")
    expected = encoder.encode(TEXTS, convert_to_numpy=True)
    assert_matches(rows.numpy(), np.concatenate([expected, expected]))
    meanwhile = LLM2Vec(stage.model, stage.tokenizer)
    assert_matches(meanwhile.encode(TEXTS, convert_to_numpy=True), expected)


@pytest.mark.parametrize("budget", [1, 30, 50])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "activation-checkpointing"])
def test_a_batch_embedded_in_pieces_gives_the_gradients_of_the_whole(step, budget: int, checkpointing: bool) -> None:
    whole_loss, whole = step(attention_dropout=0.0, scale=2.0)
    loss, pieces = step(attention_dropout=0.0, scale=2.0, token_budget=budget, gradient_checkpointing=checkpointing)
    assert_matches(loss.numpy(), whole_loss.numpy())
    assert pieces.keys() == whole.keys()
    assert any(bool(x.abs().max() > 1e-2) for x in whole.values())
    for name, x in whole.items():
        assert_matches(pieces[name].numpy(), x.numpy())


def test_pieces_give_the_gradients_of_the_whole_for_a_matryoshka_loss(step) -> None:
    nested = {
        "attention_dropout": 0.0,
        "scale": 2.0,
        "matryoshka_dims": [3, 8, 64],
        "matryoshka_weights": [1.0, 2.0, 1.0],
    }
    whole_loss, whole = step(**nested)
    loss, pieces = step(**nested, token_budget=30)
    assert_matches(loss.numpy(), whole_loss.numpy())
    assert float(whole_loss) != float(step(attention_dropout=0.0, scale=2.0)[0])
    for name, x in whole.items():
        assert_matches(pieces[name].numpy(), x.numpy())


def test_pieces_drop_the_same_when_their_gradient_is_due(step, monkeypatch: pytest.MonkeyPatch) -> None:
    """With dropout, one piece computed twice against one computed once: other random numbers would show."""
    _, kept = step(attention_dropout=0.3, token_budget=30)
    monkeypatch.setattr("llm2vec_fast.training.embedding.checkpoint", lambda f, *x, use_reentrant: f(*x))
    _, once = step(attention_dropout=0.3, token_budget=30)
    for name, x in once.items():
        assert torch.equal(kept[name], x), name


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


def test_the_adapter_that_comes_out_holds_those_merged_before(settings: Settings, tmp_path: Path) -> None:
    """Two adapters merged, a third trained: one file that needs the base alone."""
    other = tmp_path / "other"
    other.mkdir()
    weights = load_file(FOLDER / "llama-lora" / "adapter_model.safetensors")
    kept = {name: x * 0.5 for name, x in weights.items() if "layers.1." in name or "q_proj" in name}
    names = sorted({name.split("model.model.")[-1].rsplit(".lora_", 1)[0] for name in kept})
    save_file(kept, other / "adapter_model.safetensors")
    config = json.loads((FOLDER / "llama-lora" / "adapter_config.json").read_text())
    config["target_modules"] = names
    (other / "adapter_config.json").write_text(json.dumps(config))
    given = settings(peft_model_name_or_path=[str(FOLDER / "llama-lora"), str(other)], max_steps=1)
    trained = {}

    class Watched(ContrastiveTrainer):
        def train(self, *args: object, **kwargs: object) -> object:
            result = super().train(*args, **kwargs)
            trained["model"] = self.model
            return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llm2vec_fast.training.simcse.ContrastiveTrainer", Watched)
        train_simcse(SimcseArguments(**given))
    model = trained["model"].eval()
    tokenizer = load_embedding_model(SimcseArguments(**given))[1]
    batch = pack(tokenizer, [("", text) for text in TEXTS])
    layout = SequenceLayout.from_lengths(batch["lengths"])
    with torch.no_grad():
        plain = model(input_ids=batch["input_ids"], layout=layout, embed=True).rows
        exact = model.double()(input_ids=batch["input_ids"], layout=layout, embed=True).rows
    loaded = LLM2Vec.from_pretrained(FOLDER / "llama", tmp_path / "out", dtype="float32", device="cpu")
    assert_error_within(loaded.encode(TEXTS), plain, exact, GRADIENT_FACTOR)
    from_folder = LLM2Vec.from_pretrained(tmp_path / "out", dtype="float32", device="cpu")
    assert_matches(from_folder.encode(TEXTS, convert_to_numpy=True), plain.numpy())


def test_an_adapter_can_be_trained_on(settings: Settings, tmp_path: Path) -> None:
    adapter = str(FOLDER / "llama-lora")
    changes = {"peft_model_name_or_path": adapter, "continue_adapter": True}
    train_simcse(SimcseArguments(**settings("none", learning_rate=0.0, max_steps=1, **changes)))
    train_simcse(SimcseArguments(**settings("some", max_steps=2, **changes)))
    texts = {
        name: LLM2Vec.from_pretrained(FOLDER / "llama", path, dtype="float32", device="cpu").encode(TEXTS).numpy()
        for name, path in (("given", adapter), ("none", tmp_path / "none"), ("some", tmp_path / "some"))
    }
    assert_matches(texts["none"], texts["given"])
    assert np.abs(texts["some"] - texts["given"]).max() > 1e-3
    given, found = (load_file(Path(x) / "adapter_model.safetensors") for x in (adapter, tmp_path / "some"))
    assert sum(x.numel() for x in found.values()) == sum(x.numel() for x in given.values())


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


def test_two_processes_train_as_one_on_the_joined_batch(settings: Settings, launch, finished, tmp_path: Path) -> None:
    """Each text's negatives are the texts of both processes, and gradients are summed over both.

    On a machine without an accelerator nobody says that the CPU is to be used.
    """
    options = {"use_cpu": torch.accelerator.is_available()}
    options |= {**UNCLIPPED, "attention_dropout": 0.0, "learning_rate": 0.02, "max_steps": 3, "save_strategy": "no"}
    options |= {"scale": 5.0, "learn_scale": True}
    finished(launch("simcse", settings("one", **options)))
    finished(launch("simcse", settings("two", **{**options, "per_device_train_batch_size": 4}), processes=2))
    assert_trained_alike(tmp_path / "one", tmp_path / "two")


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
