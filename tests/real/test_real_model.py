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
from llm2vec_fast.kernels.products import multiplies_bfloat16

pytestmark = pytest.mark.real
LEAST = {"float32": 0.99999, "bfloat16": 0.999}
COUNTS = {"float32": 40, "bfloat16": 40 if multiplies_bfloat16() else 8}  # emulated, a text takes seconds


@pytest.fixture(scope="module")
def folder() -> Path:
    try:
        return fetch()
    except FetchError as error:
        pytest.skip(str(error))


@cache
def texts(count: int) -> list[str]:
    """Docstrings from all over the standard library, of natural lengths."""
    found = [docstring.text for docstring in collect()]
    return found[:: -(-len(found) // count)]


def directions_agree(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float(cosine_similarity(ours.double(), theirs.double(), dim=-1).min())


def encoders(folder: Path, dtype: str, adapter: str | None) -> LLM2Vec:
    return LLM2Vec.from_pretrained(folder, adapter, merge_peft=True, dtype=dtype, device="cpu")


@pytest.mark.parametrize(("dtype", "adapter"), [("float32", None), ("bfloat16", "smollm2-135m")])
def test_packed_as_alone(folder, dtype, adapter):
    encoder = encoders(folder, dtype, adapter)
    some = texts(COUNTS[dtype])
    alone = encoder.encode(some, token_budget=1)
    assert directions_agree(encoder.encode(some), alone) >= LEAST[dtype]
    assert directions_agree(encoder.encode(some, token_budget=300), alone) >= LEAST[dtype]


def test_packing_adds_no_error_to_that_of_bfloat16(folder):
    """An untrained encoder magnifies every rounding; a CPU with AMX rounds by the number of rows of a product."""
    some = texts(COUNTS["bfloat16"])
    exact = encoders(folder, "float32", None).encode(some)
    encoder = encoders(folder, "bfloat16", None)
    alone, packed = (1 - directions_agree(encoder.encode(some, token_budget=n), exact) for n in (1, None))
    assert packed <= 2 * alone


@pytest.fixture(scope="module")
def stock(folder) -> dict[str, torch.Tensor]:
    """Stock transformers, eager, bidirectional, one text at a time, mean over the tokens; by dtype."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = {}
    for dtype in LEAST:
        model = AutoModel.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
        model.config.is_causal = False
        with torch.no_grad():
            batches = (tokenizer(text, return_tensors="pt", truncation=True, max_length=512) for text in texts(8))
            found[dtype] = torch.stack([model(**b).last_hidden_state[0].float().mean(0) for b in batches])
    return found


def test_float32_as_stock_transformers_one_text_at_a_time(folder, stock):
    encoder = LLM2Vec.from_pretrained(folder, dtype="float32", device="cpu", doc_max_length=512)
    assert directions_agree(encoder.encode(texts(8)), stock["float32"]) >= LEAST["float32"]


def test_bfloat16_is_as_near_to_float32_as_stock_transformers_is(folder, stock):
    """Texts of a few tokens move by percents in bfloat16, whoever computes them: the measure is stock's own error."""
    encoder = LLM2Vec.from_pretrained(folder, dtype="bfloat16", device="cpu", doc_max_length=512)
    ours, theirs = (
        1 - cosine_similarity(rows.double(), stock["float32"].double(), dim=-1).mean()
        for rows in (encoder.encode(texts(8)), stock["bfloat16"])
    )
    assert ours <= 2 * theirs
