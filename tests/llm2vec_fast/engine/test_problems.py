"""Texts that cannot be embedded, and memory that runs out, cost these texts at most."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from reference_data import FOLDER, TEXTS
from torch import nn
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel

from llm2vec_fast import LLM2Vec
from llm2vec_fast.errors import UserError, is_out_of_memory

MANY = [f"{text} {number}" for number in range(30) for text in TEXTS]
OUT_OF_MEMORY = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cpu": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you"
    ),
    "python": MemoryError(),
}


def load(**settings: object) -> LLM2Vec:
    return LLM2Vec.from_pretrained(FOLDER / "llama", **{"dtype": "float32", "device": "cpu", **settings})


def assert_same_direction(ours: torch.Tensor, theirs: torch.Tensor, least: float = 0.99999) -> None:
    assert ours.shape == theirs.shape
    assert float(cosine_similarity(ours.double(), theirs.double(), dim=-1).min()) >= least


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Lets memory run out on more than so many tokens; the tokens of passes that fitted are in the list."""
    real = torch.nn.functional.embedding

    def limit(tokens: int, error: Exception = OUT_OF_MEMORY["cuda"]) -> list[int]:
        fitted: list[int] = []

        def embedding(ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if ids.numel() > tokens:
                raise error
            fitted.append(ids.numel())
            return real(ids, *args, **kwargs)

        monkeypatch.setattr(torch.nn.functional, "embedding", embedding)
        return fitted

    return limit


@pytest.mark.parametrize(("error", "cores"), [("cuda", 1), ("cpu", 2), ("python", 1)])
def test_where_memory_runs_out_batches_get_smaller(memory, caplog, error, cores):
    encoder = load()
    expected = encoder.encode(MANY)
    before = torch.get_num_threads()
    torch.set_num_threads(cores)
    try:
        fitted, calls = memory(200, OUT_OF_MEMORY[error]), []
        with caplog.at_level(logging.WARNING):
            rows = encoder.encode(MANY, token_budget=900, on_batch=lambda *counts: calls.append(counts))
    finally:
        torch.set_num_threads(before)
    assert_same_direction(rows, expected)
    assert max(fitted) > 100  # no smaller than it takes
    assert sum(texts for texts, _, _ in calls) == len(MANY)
    assert "memory ran out on a forward pass of" in caplog.text


def test_a_text_too_long_for_the_memory_is_named(memory):
    encoder = load(max_length=512)
    long = " ".join(MANY[:20])
    texts = [*MANY[:10], long, *MANY[10:20]]
    expected = encoder.encode(texts)
    memory(100)
    with pytest.raises(
        UserError, match=r"sentences\[10\]: memory ran out on this text alone, \d+ tokens: lower max_le"
    ):
        encoder.encode(texts)
    problems: dict[int, str] = {}
    rows = encoder.encode(texts, on_problem=problems.__setitem__)
    assert list(problems) == [10]
    assert bool(rows[10].isnan().all())
    others = [i for i in range(len(texts)) if i != 10]
    assert_same_direction(rows[others], expected[others])


def test_token_embeddings_too_come_in_smaller_batches(memory):
    encoder = load()
    expected = encoder.encode(MANY, output="tokens")
    memory(150)
    for ours, theirs in zip(encoder.encode(MANY, output="tokens"), expected, strict=True):
        assert_same_direction(ours.embeddings, theirs.embeddings)


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        *((error, True) for error in OUT_OF_MEMORY.values()),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), True),
        (OSError(12, "Cannot allocate memory"), True),
        (RuntimeError("The size of tensor a (62) must match the size of tensor b (61)"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_running_out_of_memory_looks_like(error, is_memory):
    assert is_out_of_memory(error) == is_memory


def test_any_other_error_of_a_pass_is_not_taken_for_it(monkeypatch):
    encoder = load()
    monkeypatch.setattr(torch.nn.functional, "embedding", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        encoder.encode(MANY)


def test_a_token_without_a_row_in_the_embedding_is_named():
    encoder = load()
    expected = encoder.encode(["before", "behind"])
    encoder.tokenizer.add_tokens(["<<new>>"])
    texts = ["before", "some <<new>> text", "behind"]
    for non_finite in ("raise", "keep"):
        with pytest.raises(UserError, match=r"sentences\[1\]: its token '<<new>>' has the id 384, beyond the 384 rows"):
            encoder.encode(texts, non_finite=non_finite)
    problems: dict[int, str] = {}
    rows = encoder.encode(texts, on_problem=problems.__setitem__)
    assert list(problems) == [1]
    assert bool(rows[1].isnan().all())
    assert_same_direction(rows[[0, 2]], expected)
    tokens = encoder.encode(texts, output="tokens", on_problem=problems.__setitem__)
    assert [len(text.ids) for text in tokens][1] == len(tokens[1].embeddings) == 0


def test_texts_of_later_chunks_are_named_by_their_own_place(monkeypatch):
    monkeypatch.setattr("llm2vec_fast.engine.stream.CPU_TEXTS_PER_CHUNK", 4)
    encoder = load()
    encoder.tokenizer.add_tokens(["<<new>>"])
    problems: dict[int, str] = {}
    rows = encoder.encode([*["text"] * 9, "<<new>>"], on_problem=problems.__setitem__)
    assert list(problems) == [9]
    assert np.flatnonzero(rows.isnan().any(1)).tolist() == [9]


def overflowing(dtype: str) -> LLM2Vec:
    """A layer's output leaves float16's range, but not float32's."""
    encoder = load(dtype=dtype)
    with torch.no_grad():
        encoder.model.layers[0].mlp.down_proj.weight.mul_(1e4)
    return encoder


def test_what_overflows_in_half_precision_is_computed_in_float32_without_a_copy(monkeypatch):
    encoder, copied = overflowing("float16"), copy.deepcopy

    def deepcopy(x: object, *args: Any) -> object:
        assert not isinstance(x, PreTrainedModel)
        return copied(x, *args)

    monkeypatch.setattr(copy, "deepcopy", deepcopy)
    widest = []
    real = torch.Tensor.float

    def wide(x: torch.Tensor) -> torch.Tensor:
        widest.append(x.numel())
        return real(x)

    monkeypatch.setattr(torch.Tensor, "float", wide)
    rows = encoder.encode(TEXTS)
    monkeypatch.undo()
    assert_same_direction(rows, overflowing("float32").encode(TEXTS), least=0.999)
    assert {weight.dtype for weight in encoder.model.parameters()} == {torch.float16}
    embedding = encoder.model.get_input_embeddings().weight
    assert max(widest) < embedding.numel()  # no more of it than the texts have tokens of


class Quantised(nn.Parameter):
    """Weights in a form of their own, which nobody may convert."""

    def float(self) -> torch.Tensor:
        raise NotImplementedError("quantised")


def test_weights_that_cannot_be_converted_cost_the_broken_rows_alone():
    encoder = load(dtype="bfloat16")
    token = encoder.tokenize(["z"])["input_ids"][0, -1]
    with torch.no_grad():
        encoder.model.get_input_embeddings().weight[token] = torch.nan
    expected = encoder.encode(["one", "two"])
    layer = encoder.model.layers[1].mlp.down_proj
    layer.weight = Quantised(layer.weight.detach(), requires_grad=False)
    rows = encoder.encode(["one", "z", "two"], non_finite="keep")
    assert bool(rows[1].isnan().all())
    assert_same_direction(rows[[0, 2]], expected, least=0.999)
    problems: dict[int, str] = {}
    encoder.encode(["one", "z", "two"], on_problem=problems.__setitem__)
    assert problems == {1: "the embedding is not finite, in float32 too"}


def test_no_memory_for_float32_costs_the_broken_rows_alone(monkeypatch):
    encoder = overflowing("float16")
    monkeypatch.setattr("llm2vec_fast.engine.wide._wide", lambda tensor: (_ for _ in ()).throw(MemoryError()))
    assert bool(encoder.encode(TEXTS, non_finite="keep").isnan().all())
