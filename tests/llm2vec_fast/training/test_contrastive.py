"""Supervised contrastive training: the original's loss, what counts as a negative, the order of data sets, restarts."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from reference_data import FOLDER, TEXTS, arrays, assert_matches
from safetensors.torch import load_file, save_file

from llm2vec_fast.errors import UserError
from llm2vec_fast.training.arguments import ContrastiveArguments
from llm2vec_fast.training.checkpoints import last_checkpoint, whole_or_gone
from llm2vec_fast.training.contrast import ContrastiveTrainer, load_embedding_model
from llm2vec_fast.training.contrastive import PairCollator, train_contrastive
from llm2vec_fast.training.embedding import Embedded
from llm2vec_fast.training.pairs import Pairs
from llm2vec_fast.training.sampling import OneSetAtATime

Settings = Callable[..., dict[str, object]]
# What the original's loss gives for the queries, documents and hard negatives described in the test: see tests/data.
ORIGINAL_LOSSES = {
    ("llama", 20): 12.555013656616211,
    ("llama", 50): 31.383310317993164,
    ("mistral", 20): 10.929780960083008,
    ("mistral", 50): 27.28106117248535,
}


@pytest.fixture
def pairs(tmp_path: Path, sentences: list[str]) -> str:
    """30 pairs with a hard negative each, of different words."""
    path = tmp_path / "pairs.jsonl"
    rows = [
        {"query": sentences[i], "positive": sentences[i + 30], "negative": f"{sentences[i]} stone"} for i in range(30)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def given(settings: Settings, pairs: str) -> Settings:
    """Arguments of a short run on these pairs."""
    return lambda output="out", **changes: settings(output, **{"train_file": [pairs], "warmup_steps": 0, **changes})


def written(path: Path, *rows: dict[str, object]) -> str:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_file_that_never_fills_a_batch_is_named(
    given: Settings, pairs: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    few = written(tmp_path / "few.jsonl", {"query": "a cat", "positive": "sat"}, {"query": "rain", "positive": "fell"})
    train_contrastive(ContrastiveArguments(**given(train_file=[pairs, few], max_steps=1, save_strategy="no")))
    assert f"{few} has 2 rows and a batch takes 8: none of them is trained on" in caplog.text
    assert f"{pairs} has" not in caplog.text


@pytest.mark.parametrize(("architecture", "scale"), ORIGINAL_LOSSES)
def test_the_loss_is_the_originals(given: Settings, architecture: str, scale: int) -> None:
    """Queries with an instruction, documents without, and the queries in reverse as hard negatives."""
    found, count = arrays(architecture), len(TEXTS)
    query, positive = (torch.from_numpy(found[f"emb|{kind}|mean|skip1"]) for kind in ("instr", "plain"))
    arguments = ContrastiveArguments(**given(scale=float(scale), per_device_train_batch_size=2))
    stage, _ = load_embedding_model(arguments)
    trainer = ContrastiveTrainer(stage, arguments, [count], train_dataset=TEXTS)
    rows = torch.cat([query, positive, query.flip(0)])
    loss = trainer._loss(Embedded(rows, None), count, torch.arange(2 * count))
    assert_matches(loss.numpy(), np.float32(ORIGINAL_LOSSES[architecture, scale]))


def test_a_batch_holds_queries_documents_and_negatives(given: Settings, tmp_path: Path) -> None:
    """Instructions are read and not pooled: the batch's embeddings are those of the encoder."""
    from llm2vec_fast import LLM2Vec

    file = written(
        tmp_path / "rows.parquet",
        {"query": "a cat", "positive": "the cat sat", "negative": ["rain fell", "a wall", "a river"]},
        {"query": "a wall", "positive": "old stone walls", "negative": []},
    )
    arguments = ContrastiveArguments(
        **given(train_file=[file], negatives=2, query_instruction="find it:", per_device_train_batch_size=2)
    )
    data = Pairs([file], arguments)
    stage, tokenizer = load_embedding_model(arguments)
    batch = PairCollator(tokenizer)([data[0], data[1]])
    assert batch["queries"] == 2
    assert len(batch["lengths"]) == 2 + 2 + 2
    assert len(batch["ids"]) == 4
    stage.model.eval()
    trainer = ContrastiveTrainer(stage, arguments, [2], train_dataset=data)
    trainer._loss = lambda embedded, *_: embedded.rows  # what the loss is of
    with torch.no_grad():
        rows = trainer.compute_loss(stage.model, batch)
    negatives = [text for _, text in data[0]["negatives"]]
    encoder = LLM2Vec.from_pretrained(FOLDER / "llama", dtype="float32", device="cpu")
    texts = [["find it:", "a cat"], ["find it:", "a wall"], *[["", t] for t in ("the cat sat", "old stone walls")]]
    assert_matches(rows.numpy(), encoder.encode([*texts, *[["", t] for t in negatives]], convert_to_numpy=True))


def test_draws_follow_from_the_epoch_and_the_row(given: Settings, tmp_path: Path) -> None:
    rows = [{"q": f"q {i}", "d": [f"d {i} {j}" for j in range(4)], "n": [f"n {j}" for j in range(9)]} for i in range(6)]
    columns = {"query_column": "q", "positive_column": "d", "negative_columns": "n", "negatives": 3}
    file = written(tmp_path / "rows.jsonl", *rows)
    arguments = ContrastiveArguments(**given(train_file=[file], **columns))
    one, other = Pairs([file], arguments), Pairs([file], arguments)
    other.epoch = 1
    assert [one[i] for i in range(6)] == [one[i] for i in range(6)]
    assert [one[i]["positive"] for i in range(6)] != [other[i]["positive"] for i in range(6)]
    for i in range(6):
        texts = [text for _, text in one[i]["negatives"]]
        assert len(set(texts)) == 3
        assert one[i]["positive"][1] in rows[i]["d"]


def test_what_suits_a_query_is_never_its_negative(given: Settings, tmp_path: Path) -> None:
    """Two rows of one query, and hard negatives that are the rows' documents."""
    file = written(
        tmp_path / "rows.jsonl",
        {"query": "a cat", "positive": "the cat sat", "negative": "the  cat sat"},
        {"query": "a cat", "positive": "a cat on a mat", "negative": "the cat sat"},
    )
    arguments = ContrastiveArguments(**given(train_file=[file], per_device_train_batch_size=2))
    data = Pairs([file], arguments)
    stage, tokenizer = load_embedding_model(arguments)
    trainer = ContrastiveTrainer(stage, arguments, [2], train_dataset=data)
    loss = trainer.compute_loss(stage.model, PairCollator(tokenizer)([data[0], data[1]]))
    assert float(loss.detach()) == 0.0


def test_every_batch_is_of_one_data_set() -> None:
    sampler = OneSetAtATime([10, 25, 3], batch=4, seed=1)
    order = list(sampler)
    assert len(order) == len(sampler) == 4 * (2 + 6 + 0)
    assert len(set(order)) == len(order)
    ends = np.cumsum([10, 25, 3])
    sets = np.searchsorted(ends, order, side="right").reshape(-1, 4)
    assert (sets == sets[:, :1]).all()
    assert len(set(sets[:, 0])) == 2
    assert np.abs(np.diff(sets[:, 0])).sum() > 1  # batches of the two sets are mixed
    assert order == list(sampler)
    sampler.epoch = 1
    assert order != list(sampler)


def test_each_epoch_has_an_order_of_its_own(given: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows and of what is drawn for them: three batches an epoch."""
    seen: list[int] = []

    def collate(collator: PairCollator, rows: list[dict[str, object]]) -> dict[str, torch.Tensor]:
        seen.extend(int(row["row"]) for row in rows)
        return batch(collator, rows)

    batch = PairCollator.__call__
    monkeypatch.setattr(PairCollator, "__call__", collate)
    train_contrastive(ContrastiveArguments(**given(max_steps=6, save_strategy="no", seed=5)))
    for epoch in (0, 1):
        sampler = OneSetAtATime([30], 8, 5)
        sampler.epoch = epoch
        assert seen[24 * epoch : 24 * epoch + 24] == list(sampler)


def test_the_scale_is_learned_and_kept(given: Settings, tmp_path: Path) -> None:
    """Interrupted after two of four steps: the scale goes on where it was, and the encoder loads without it."""
    changes = {"learn_scale": True, "scale": 20.0, "lora_dropout": 0.0}
    for output in ("whole", "cut"):
        train_contrastive(ContrastiveArguments(**given(output, **changes)))
    cut = tmp_path / "cut"
    for path in sorted(cut.rglob("checkpoint-4/**/*"), reverse=True):
        path.unlink()
    (cut / "adapter_model.safetensors").unlink()
    train_contrastive(ContrastiveArguments(**given("cut", **changes)))
    whole, again = (load_file(tmp_path / x / "checkpoint-4" / "scale.safetensors") for x in ("whole", "cut"))
    assert whole.keys() == {"log_scale"}
    assert torch.equal(whole["log_scale"], again["log_scale"])
    assert float(whole["log_scale"].exp()) != pytest.approx(20.0, abs=1e-3)
    one, other = (load_file(tmp_path / x / "adapter_model.safetensors") for x in ("whole", "cut"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_all_weights_can_be_trained(given: Settings, tmp_path: Path) -> None:
    from llm2vec_fast import LLM2Vec

    train_contrastive(ContrastiveArguments(**given(lora_r=0, learn_scale=True, max_steps=1, save_strategy="no")))
    encoder = LLM2Vec.from_pretrained(tmp_path / "out", dtype="float32", device="cpu")
    before = LLM2Vec.from_pretrained(FOLDER / "llama", dtype="float32", device="cpu")
    assert (encoder.encode("a cat") - before.encode("a cat")).abs().max() > 1e-3
    assert "log_scale" not in load_file(tmp_path / "out" / "model.safetensors")


def test_a_full_disk_is_told_and_the_checkpoint_before_stays(
    given: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(trainer: ContrastiveTrainer, folder: str) -> None:
        if folder.endswith("checkpoint-4"):
            Path(folder, "optimizer.pt").write_bytes(b"a part of it")
            raise OSError(28, "No space left on device")
        write(trainer, folder)

    write = ContrastiveTrainer._save_optimizer_and_scheduler
    with monkeypatch.context() as patch:
        patch.setattr(ContrastiveTrainer, "_save_optimizer_and_scheduler", full)
        with pytest.raises(
            UserError,
            match=r"the checkpoint .*checkpoint-4 cannot be written: No space left on device; make room, and the same "
            "command goes on from checkpoint-2",
        ):
            train_contrastive(ContrastiveArguments(**given(max_steps=6)))
    assert last_checkpoint(tmp_path / "out") == str(tmp_path / "out" / "checkpoint-2")
    assert not (tmp_path / "out" / "checkpoint-4").exists()
    train_contrastive(ContrastiveArguments(**given(max_steps=6)))
    train_contrastive(ContrastiveArguments(**given("whole", max_steps=6)))
    whole, cut = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "out"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def save_tensors(path: Path) -> None:
    save_file({"x": torch.ones(100_000)}, path)


def save_pickle(path: Path) -> None:
    torch.save({"x": torch.ones(100_000)}, path)


def save_bytes(path: Path) -> None:
    path.write_bytes(bytes(400_000))


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """Writing beyond so many bytes fails, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("save", [save_tensors, save_pickle, save_bytes])
def test_every_writers_error_is_told(tmp_path: Path, save: Callable[[Path], None]) -> None:
    folder = tmp_path / "checkpoint-7"
    folder.mkdir()

    def write() -> None:
        with whole_or_gone(folder), no_file_above(100_000):
            save(folder / "file")

    with pytest.raises(UserError, match=r"checkpoint-7 cannot be written: .+; make room, and the same command begins"):
        write()
    assert not folder.exists()


@pytest.mark.parametrize(
    ("row", "changes", "message"),
    [
        ({"text": "a", "positive": "b"}, {}, r"rows.jsonl has no column 'query' .query_column.: its"),
        ({"query": "a"}, {}, r"has no column 'positive' .positive_column.: its"),
        ({"query": "a", "positive": "b"}, {"negative_columns": ["hard"]}, "has no column 'hard'"),
        ({"query": "a", "positive": "b"}, {"id_column": "name"}, "has no column 'name'"),
        ({"query": " ", "positive": "b"}, {}, "has no row with a text in 'query' and in 'positive'"),
        ({"query": "a", "positive": [""]}, {}, "has no row with a text"),
        ({"query": "a", "positive": "b"}, {"query_instruction": ["x", "y"]}, "query_instruction has 2 values for 1 fi"),
        (
            {"query": "a", "positive": "b"},
            {"query_instruction": "find " * 30, "per_device_train_batch_size": 1},
            "its instruction fills all of max_length=24 tokens and none of its text is left",
        ),
        ({"query": "a", "positive": "b"}, {}, "a batch takes 8 rows and the largest training file has 1"),
        ({"query": "a"}, {"symmetric": True, "document_negatives": True}, "symmetric and document_negatives are both"),
    ],
)
def test_unusable_data_is_refused_in_one_sentence(
    given: Settings, tmp_path: Path, row: dict, changes: dict, message: str
) -> None:
    file = written(tmp_path / "rows.jsonl", row)
    with pytest.raises(UserError, match=message) as caught:
        train_contrastive(ContrastiveArguments(**given(train_file=[file], **changes)))
    assert "\n" not in str(caught.value)
