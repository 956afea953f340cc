"""A GGUF file gives the embeddings of the model it was made from, or is refused by the name of what cannot be read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from reference_data import FOLDER, PUBLISHED_BOUND, TEXTS

from llm2vec_fast import LLM2Vec
from llm2vec_fast.errors import ModelLoadError

pytest.importorskip("gguf")
from tiny_gguf import llama3_factors, write_family, write_gguf
from tiny_models import tiny_model

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CONFIG = json.loads((FOLDER / "llama" / "config.json").read_text())


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Long enough for slow frequencies to turn."""
    return [*TEXTS, " ".join(TEXTS) * 3]


def load(place, **options) -> LLM2Vec:
    return LLM2Vec.from_pretrained(place, **{"dtype": "float32", "device": "cpu", **options})


def embeddings(place: Path, texts: list[str], ids: LLM2Vec | None = None) -> torch.Tensor:
    """Of the ids that the tokenizer of ``ids`` makes: transformers adds a begin token to those of GGUF files."""
    encoder = load(place)
    with torch.no_grad():
        return encoder((ids or encoder).tokenize(texts))


def scaled(folder: Path, scaling: dict) -> Path:
    """The reference model with scaled rotary frequencies."""
    shutil.copytree(FOLDER / "llama", folder)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "rope_scaling": scaling}))
    return folder


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert float((ours - theirs).abs().max()) <= PUBLISHED_BOUND * float(theirs.abs().max().clamp(min=1))


@pytest.mark.parametrize(("factor", "original"), [(8.0, 32), (32.0, 64), (4.0, 8192)])
def test_the_scaling_of_llama_3_comes_back_from_its_factors(tmp_path, texts, factor, original):
    scaling = {**LLAMA3, "factor": factor, "original_max_position_embeddings": original}
    folder = scaled(tmp_path / "model", scaling)
    write_gguf(folder, tmp_path / "tiny.gguf", tensors={"rope_freqs.weight": llama3_factors(CONFIG, scaling)})
    plain = load(folder)
    ours = embeddings(tmp_path / "tiny.gguf", texts, plain)
    assert_same(ours, embeddings(folder, texts, plain))
    load(tmp_path / "tiny.gguf").save(tmp_path / "saved")
    assert_same(embeddings(tmp_path / "saved", texts, plain), ours)
    if original < 8192:  # else no frequency of so small a model is scaled by less than all of it
        unscaled = embeddings(FOLDER / "llama", texts, plain)
        assert float((ours - unscaled).abs().max()) > 0.01


@pytest.mark.parametrize(
    ("keys", "scaling"),
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        ({"rope.scale_linear": 1.0, "rope.scaling.type": "none"}, None),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        ),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 8.0}, None),
        ({"rope.scaling.finetuned": True}, None),
    ],
    ids=["linear", "old-linear", "old-none", "yarn", "none", "finetuned"],
)
def test_scaling_that_its_keys_tell(tmp_path, texts, keys, scaling):
    folder = scaled(tmp_path / "model", scaling) if scaling else FOLDER / "llama"
    write_gguf(FOLDER / "llama", tmp_path / "tiny.gguf", keys=keys)
    plain = load(folder)
    assert_same(embeddings(tmp_path / "tiny.gguf", texts, plain), embeddings(folder, texts, plain))


@pytest.mark.parametrize(
    ("keys", "tensors", "named"),
    [
        ({}, {"rope_freqs.weight": np.linspace(1, 9, 8, dtype=np.float32) ** 2}, r"tensor rope_freqs\.weight"),
        ({}, {"rope_freqs.weight": np.full(5, 2, np.float32)}, r"tensor rope_freqs\.weight"),
        ({}, {"rope_factors_long.weight": np.ones(8, np.float32)}, r"tensor rope_factors_long\.weight"),
        ({}, {"blk.0.attn_q.bias": np.ones(64, np.float32)}, r"1 tensors such as blk\.0\.attn_q\.bias"),
        ({}, {"blk.1.post_attention_norm.weight": np.ones(64, np.float32)}, "post_attention_norm"),
        ({"rope.scaling.type": "longrope", "rope.scaling.factor": 2.0}, {}, r"rope\.scaling\.type=longrope"),
        ({"rope.scaling.type": "yarn", "rope.scaling.yarn_beta_fast": 16.0}, {}, r"yarn_beta_fast=16"),
        ({"rope.scaling.attn_factor": 1.2}, {}, r"rope\.scaling\.attn_factor=1\.2"),
        ({"attn_logit_softcapping": 2.0}, {}, r"llama\.attn_logit_softcapping=2"),
        ({"attention.sliding_window": 5}, {}, r"llama\.attention\.sliding_window=5"),
        ({"expert_count": 4, "expert_used_count": 2}, {}, r"llama\.expert_count=4"),
        ({"attention.value_length": 8}, {}, r"attention\.value_length=8"),
        ({"residual_scale": 2.0}, {}, r"llama\.residual_scale=2"),
        ({"a_key_of_next_year": 3}, {}, "a_key_of_next_year=3"),
    ],
)
def test_what_has_no_place_is_refused_by_name(tmp_path, keys, tensors, named):
    write_gguf(FOLDER / "llama", tmp_path / "tiny.gguf", keys, tensors)
    with pytest.raises(ModelLoadError, match=named) as caught:
        load(tmp_path / "tiny.gguf")
    assert str(tmp_path / "tiny.gguf") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_decides_nothing_is_no_hindrance(tmp_path, texts):
    keys = {
        "attention.causal": True, "attention.key_length": 16, "attention.value_length": 16, "expert_count": 0,
        "pooling_type": 1, "final_logit_softcapping": 30.0, "attention.sliding_window": 0, "residual_scale": 0.0,
    }  # fmt: skip
    factors = {"rope_freqs.weight": np.ones(8, np.float32)}
    write_gguf(FOLDER / "llama", tmp_path / "tiny.gguf", keys, factors)
    plain = load(FOLDER / "llama")
    assert_same(embeddings(tmp_path / "tiny.gguf", texts, plain), embeddings(FOLDER / "llama", texts, plain))


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("qwen2", {"rope.freq_base": 10000.0}),
        ("qwen3", {"rope.freq_base": 10000.0, "attention.key_length": 8, "attention.value_length": 8}),
        ("gemma2", {"attention.key_length": 8, "attn_logit_softcapping": 2.0, "attention.sliding_window": 5}),
        (
            "gemma3",
            {
                "attention.key_length": 8, "attention.sliding_window": 5, "attention.sliding_window_pattern": 2,
                "rope.freq_base": 1000000.0, "rope.freq_base_swa": 10000.0,
            },
        ),
    ],
    ids=["qwen2", "qwen3", "gemma2", "gemma3"],
)  # fmt: skip
def test_other_families(tmp_path, texts, family, keys):
    """Gemma's scale of scores, caps and windows are in no key that transformers reads."""
    model = tiny_model(family, vocab_size=CONFIG["vocab_size"])
    model.save_pretrained(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(FOLDER / "llama" / name, tmp_path / "model")
    write_family(model, family, FOLDER / "llama", tmp_path / "tiny.gguf", keys)
    plain = load(tmp_path / "model")
    assert_same(embeddings(tmp_path / "tiny.gguf", texts, plain), embeddings(tmp_path / "model", texts, plain))


def test_a_file_of_a_folder_by_gguf_file(tmp_path, texts):
    write_gguf(FOLDER / "llama", tmp_path / "tiny.gguf")
    ours = load(tmp_path, gguf_file="tiny.gguf").encode(texts)
    assert torch.equal(ours, load(tmp_path / "tiny.gguf").encode(texts))
    with pytest.raises(ModelLoadError, match="does not exist: check the path"):
        load(tmp_path, gguf_file="other.gguf")
