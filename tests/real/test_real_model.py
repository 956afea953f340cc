"""A real model on real texts: a text's embedding does not depend on the texts beside it."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cosine_similarity
from transformers import AutoModel, AutoTokenizer

from benchmarks.fetch.docstrings import collect
from benchmarks.fetch.smollm2 import FetchError, fetch
from llm2vec_fast import LLM2Vec

pytestmark = pytest.mark.real
LEAST = {"float32": 0.99999, "bfloat16": 0.999}


@pytest.fixture(scope="module")
def folder() -> Path:
    try:
        return fetch()
    except FetchError as error:
        pytest.skip(str(error))


@cache
def texts() -> list[str]:
    """Docstrings from all over the standard library, of natural lengths."""
    found = [docstring.text for docstring in collect()]
    return found[:: len(found) // 100]


def directions_agree(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float(cosine_similarity(ours.double(), theirs.double(), dim=-1).min())


@pytest.mark.parametrize("dtype", LEAST)
def test_packed_as_alone(folder, dtype):
    encoder = LLM2Vec.from_pretrained(folder, dtype=dtype, device="cpu")
    alone = encoder.encode(texts(), token_budget=1)
    assert directions_agree(encoder.encode(texts()), alone) >= LEAST[dtype]
    assert directions_agree(encoder.encode(texts(), token_budget=500), alone) >= LEAST[dtype]


@pytest.mark.parametrize("dtype", LEAST)
def test_as_stock_transformers_one_text_at_a_time(folder, dtype):
    encoder = LLM2Vec.from_pretrained(folder, dtype=dtype, device="cpu", doc_max_length=512)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    stock = AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    stock.config.is_causal = False
    some = texts()[::4]
    with torch.no_grad():
        expected = [
            stock(**tokenizer(text, return_tensors="pt", truncation=True, max_length=512)).last_hidden_state[0].mean(0)
            for text in some
        ]
    assert directions_agree(encoder.encode(some), torch.stack(expected)) >= LEAST[dtype]
