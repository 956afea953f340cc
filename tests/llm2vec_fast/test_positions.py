"""Models that look positions up in a table take as many tokens as it has, and say so."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from itertools import cycle, islice

import pytest
import torch
from reference_data import FOLDER, TEXTS
from tiny_models import SHAPE
from transformers import CONFIG_MAPPING, AutoModel, AutoTokenizer, PreTrainedModel

from llm2vec_fast import LLM2Vec, make_bidirectional
from llm2vec_fast.positions import within_positions

POSITIONS = 24
WITH_TABLE = ("gpt2", "opt", "gpt_bigcode", "codegen", "gptj", "ctrl", "bert", "electra")


def model(kind: str) -> PreTrainedModel:
    sizes = {**SHAPE, "vocab_size": 384, "max_position_embeddings": POSITIONS}
    other = {"ffn_dim": 48, "word_embed_proj_dim": 32, "rotary_dim": 8, "dff": 48, "n_inner": 48}
    config = CONFIG_MAPPING[kind](**sizes, **other)
    torch.manual_seed(0)
    return make_bidirectional(AutoModel.from_config(config, attn_implementation="eager")).eval()


def encoder(kind: str, **settings: object) -> LLM2Vec:
    return LLM2Vec(model(kind), AutoTokenizer.from_pretrained(FOLDER / "llama"), **settings)


def words(count: int) -> Iterator[str]:
    return islice(cycle(" ".join(TEXTS).split()), count)


@pytest.mark.parametrize("kind", WITH_TABLE)
def test_a_text_longer_than_the_table_is_cut_there_and_said(kind: str) -> None:
    long = " ".join(words(200))
    with pytest.warns(UserWarning, match=rf"max_length=512 is beyond the {POSITIONS} positions that \w+ has"):
        ours = encoder(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = ours.encode([long, "short"])
        assert ours.tokenize([long])["input_ids"].shape == (1, POSITIONS)
        assert len(ours.encode(long, output="tokens").ids) == POSITIONS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        asked = encoder(kind, max_length=POSITIONS, doc_max_length=POSITIONS)
        expected = asked.encode([long, "short"])
    assert torch.isfinite(found).all()
    assert (found - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "gemma3_text"])
def test_rotary_positions_have_no_end(kind: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = encoder(kind)
        assert within_positions(ours.model, 10**6) == 10**6
        assert len(ours.encode(" ".join(words(200)), output="tokens").ids) > POSITIONS
