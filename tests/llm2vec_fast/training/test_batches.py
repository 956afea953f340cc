"""Rows count once, in training and in evaluation, however many processes share them and whatever batches they fill."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from reference_data import FOLDER
from torch.nn import functional as F
from torch.utils.data import DataLoader
from training_runs import UNCLIPPED, assert_trained_alike
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm2vec_fast import LLM2Vec
from llm2vec_fast.errors import UserError
from llm2vec_fast.training.arguments import ContrastiveArguments, MntpArguments, SimcseArguments
from llm2vec_fast.training.contrastive import train_contrastive
from llm2vec_fast.training.masking import IGNORED
from llm2vec_fast.training.mntp import MntpCollator, Sequences, train_mntp
from llm2vec_fast.training.sampling import NO_ROW, EverySetOnce, without_repeats
from llm2vec_fast.training.simcse import train_simcse
from llm2vec_fast.training.texts import read_texts, tokenise
from llm2vec_fast.training.word_level import WordLevelArguments, train_word_level

Settings = Callable[..., dict[str, Any]]
PLAIN = {"save_strategy": "no", "max_steps": -1, "warmup_steps": 0, **UNCLIPPED}
WITHOUT = {name: value for name, value in PLAIN.items() if name != "lora_dropout"}
LENGTHS = {"max_length": 24, "doc_max_length": 24}  # those of `settings`


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_get_every_row_once_in_as_many_batches(processes: int, drop_last: bool) -> None:
    for count in range(1, 30):
        shares = []
        for rank in range(processes):
            plain = DataLoader(range(count), batch_size=6, drop_last=drop_last, collate_fn=list)
            given = {"num_processes": processes, "process_index": rank}
            shares.append(list(without_repeats(prepare_data_loader(plain, **given, put_on_device=False))))
        whole = 6 * processes
        expected = count // whole * whole if drop_last else count
        assert {len(batches) for batches in shares} == {-(-expected // whole)}
        steps = [sorted(row for batch in step for row in batch) for step in zip(*shares, strict=True)]
        assert steps == [list(range(first, min(first + whole, count))) for first in range(0, expected, whole)]


def test_a_batch_of_evaluation_holds_rows_of_one_set() -> None:
    order = list(EverySetOnce([5, 0, 4, 1], 4))
    assert len(order) == len(EverySetOnce([5, 0, 4, 1], 4))
    batches = [[row for row in order[i : i + 4] if row != NO_ROW] for i in range(0, len(order), 4)]
    assert batches == [[0, 1, 2, 3], [4], [5, 6, 7, 8], [9]]


@pytest.fixture
def parts(sentences: list[str], tmp_path: Path) -> dict[str, dict[str, Any]]:
    """Files of a stage, of which no number of rows fills batches of 12, and two of them to evaluate on."""

    def write(name: str, content: str) -> str:
        (tmp_path / name).write_text(content)
        return str(tmp_path / name)

    def pairs(name: str, first: int, last: int) -> str:
        rows = [
            {"query": sentences[i], "positive": f"so {sentences[i]}", "negative": [f"{i}"] * 2}
            for i in range(first, last)
        ]
        return write(name, "".join(json.dumps(row) + "\n" for row in rows))

    def words(texts: list[str]) -> str:
        return "\n\n".join("\n".join(f"{word} L{len(word)}" for word in text.split()) for text in texts)

    texts = {
        "train_file": [write("a.txt", "\n".join(sentences[:29]))],
        "validation_file": [write("b.txt", "\n".join(sentences[30:47])), write("c.txt", "\n".join(sentences[50:54]))],
    }
    return {
        "mntp": {**texts, "mask_token_type": "eos", "line_by_line": True},
        "simcse": {**texts, "attention_dropout": 0.0, "scale": 1.0},
        "contrastive": {
            "train_file": [pairs("a.jsonl", 1, 30)],
            "validation_file": [pairs("b.jsonl", 30, 47), pairs("c.jsonl", 50, 54)],
        },
        "word-level": {
            "train_file": [write("a.conll", words(sentences[:4]))],
            "validation_file": [write("b.conll", words(sentences[30:34])), write("c.conll", words(sentences[50:51]))],
            "max_seq_length": 64,
            "classifier_dropout": 0.0,
        },
    }


def evaluated(folder: Path) -> list[float]:
    """The loss of every evaluation."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [line["eval_loss"] for line in history if "eval_loss" in line]


@pytest.mark.parametrize(
    ("stage", "several"),
    [
        ("mntp", (3, 2)),
        ("simcse", (2, 1)),
        ("contrastive", (3, 1)),
        ("word-level", (2, 2)),
    ],
    ids=["mntp", "simcse", "contrastive", "word-level"],
)
def test_processes_train_and_evaluate_as_one(
    stage: str,
    several: tuple[int, int],
    parts: dict[str, dict[str, Any]],
    settings: Settings,
    launch: Callable[..., Any],
    finished: Callable[..., str],
    tmp_path: Path,
) -> None:
    """``several`` processes and accumulated parts: the last batch, the last accumulated one and each file's last
    evaluated one are not full, or are empty."""
    given = {**(WITHOUT if stage == "word-level" else PLAIN), **parts[stage], "eval_strategy": "epoch"}
    given |= {"num_train_epochs": 2, "learning_rate": 0.02}
    for name, (processes, accumulated) in {"one": (1, 1), "several": several}.items():
        sizes = {
            "per_device_train_batch_size": 12 // processes // accumulated,
            "per_device_eval_batch_size": 12 // processes,
            "gradient_accumulation_steps": accumulated,
        }
        finished(launch(stage, settings(name, **given, **sizes), processes))
    one = evaluated(tmp_path / "one")
    assert len(one) == 2
    assert evaluated(tmp_path / "several") == pytest.approx(one, rel=1e-5)
    if stage != "word-level":
        assert_trained_alike(tmp_path / "one", tmp_path / "several")
        return
    steps = [json.loads((tmp_path / x / "trainer_state.json").read_text())["log_history"] for x in ("one", "several")]
    losses = [[line["loss"] for line in history if "loss" in line] for history in steps]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("size", [5, 21], ids=lambda size: f"by-{size}")
def test_mntp_is_evaluated_by_the_mean_over_hidden_tokens(
    parts: dict[str, dict[str, Any]], settings: Settings, size: int
) -> None:
    """Against stock PyTorch, a text at a time."""
    given = {**PLAIN, **parts["mntp"], "learning_rate": 0.0, "max_steps": 1, "seed": 3, "dataloader_drop_last": True}
    found = train_mntp(MntpArguments(**settings(per_device_eval_batch_size=size, **given))).metrics["eval_loss"]
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "llama")
    model = AutoModelForCausalLM.from_pretrained(FOLDER / "llama", dtype=torch.float32, attn_implementation="eager")
    model.config.is_causal = False
    rows = Sequences(tokenise(read_texts(given["validation_file"], "text"), tokenizer, 24, line_by_line=True), seed=3)
    losses = []
    for i in range(len(rows)):
        batch = MntpCollator(tokenizer, mask_token="eos")([rows[i]])
        with torch.no_grad():
            logits = model(batch["input_ids"]).logits[0]
        losses += F.cross_entropy(logits[:-1], batch["labels"][0, 1:], reduction="none")[
            batch["labels"][0, 1:] != IGNORED
        ].tolist()
    assert len(rows) == 21
    assert found == pytest.approx(np.mean(losses), rel=1e-5)


def test_pairs_are_evaluated_by_the_mean_over_queries_in_batches_of_one_file(
    parts: dict[str, dict[str, Any]], settings: Settings
) -> None:
    """Against the formula, on what an encoder makes of the texts."""
    given = {**PLAIN, **parts["contrastive"], "learning_rate": 0.0, "max_steps": 1, "negatives": 2}
    given |= {"per_device_eval_batch_size": 12, "dataloader_drop_last": True}
    found = train_contrastive(ContrastiveArguments(**settings(**given))).metrics["eval_loss"]
    encoder = LLM2Vec.from_pretrained(FOLDER / "llama", **LENGTHS, dtype="float32", device="cpu")
    losses = []
    for file in given["validation_file"]:
        rows = [json.loads(line) for line in Path(file).read_text().splitlines()]
        for first in range(0, len(rows), 12):
            some = rows[first : first + 12]
            documents = [row["positive"] for row in some] + [text for row in some for text in row["negative"]]
            queries, documents = (
                F.normalize(encoder.encode(x), dim=1) for x in ([row["query"] for row in some], documents)
            )
            losses += F.cross_entropy(50 * queries @ documents.T, torch.arange(len(some)), reduction="none").tolist()
    assert len(losses) == 21
    assert found == pytest.approx(np.mean(losses), rel=1e-4)


def test_words_are_evaluated_by_the_mean_over_labelled_ones(
    parts: dict[str, dict[str, Any]], settings: Settings, tmp_path: Path
) -> None:
    """In batches that hold different numbers of labels that training never saw."""
    (tmp_path / "d.conll").write_text("cat L3\nmat L3\nriver NONE\nrain NONE\nstone L5\ncat NONE\nold L3\n")
    given = {**WITHOUT, **parts["word-level"], "validation_file": [str(tmp_path / "d.conll")], "max_steps": 1}
    found = []
    for size in (2, 3, 100):
        options = settings(str(size), **given, per_device_eval_batch_size=size, eval_strategy="steps", eval_steps=1)
        train_word_level(WordLevelArguments(**options, dataloader_drop_last=size == 3))
        scores = json.loads((tmp_path / str(size) / "validation_results.json").read_text())
        found.append([*evaluated(tmp_path / str(size)), scores["validation_accuracy"]])
    assert found == [pytest.approx(found[-1], rel=1e-5)] * 3


def test_simcse_is_evaluated_by_the_mean_over_texts(parts: dict[str, dict[str, Any]], settings: Settings) -> None:
    """Of 21 texts in batches of 20 one is alone: there is no other to tell it from."""
    given = {**PLAIN, **parts["simcse"], "learning_rate": 0.0, "max_steps": 1}
    given["per_device_eval_batch_size"] = 20
    found = train_simcse(SimcseArguments(**settings(**given))).metrics["eval_loss"]
    encoder = LLM2Vec.from_pretrained(FOLDER / "llama", **LENGTHS, dtype="float32", device="cpu")
    texts = read_texts(given["validation_file"], "text")["text"][:20]
    rows = F.normalize(encoder.encode(texts), dim=1)
    assert found == pytest.approx(20 / 21 * float(F.cross_entropy(rows @ rows.T, torch.arange(20))), rel=1e-4)


def test_a_run_of_which_no_batch_is_left_is_refused(parts: dict[str, dict[str, Any]], settings: Settings) -> None:
    given = {**PLAIN, **parts["mntp"], "per_device_train_batch_size": 30, "dataloader_drop_last": True}
    with pytest.raises(UserError, match="dataloader_drop_last=True leaves no step: a batch takes 30 sequences"):
        train_mntp(MntpArguments(**settings(**given)))
