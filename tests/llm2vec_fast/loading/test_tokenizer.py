"""Tokens without a row in the model's embedding are found when a model is loaded."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from reference_data import FOLDER, TEXTS
from safetensors.torch import load_file, save_file

from llm2vec_fast import LLM2Vec
from llm2vec_fast.errors import ModelLoadError


@pytest.fixture
def model(tmp_path) -> Path:
    return Path(shutil.copytree(FOLDER / "llama", tmp_path / "model"))


def load(place) -> LLM2Vec:
    return LLM2Vec.from_pretrained(place, dtype="float32", device="cpu")


def with_rows(folder: Path, rows: int) -> None:
    """The model with so many rows in its embedding; its tokenizer has 384 tokens."""
    weights = load_file(folder / "model.safetensors")
    for name in [name for name in weights if "embed_tokens" in name or "lm_head" in name]:
        table = weights[name]
        weights[name] = torch.cat([table, table])[:rows].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": rows}))


def with_token(folder: Path, token: str, index: int, **changes) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    kind = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True, **changes}
    tokenizer["added_tokens"].append({"id": index, "content": token, **kind})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def test_more_rows_than_tokens_are_usual(model):
    with_rows(model, 500)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(load(model).encode(TEXTS), load(FOLDER / "llama").encode(TEXTS))


def test_a_tokenizer_that_makes_text_into_unknown_tokens_is_refused(model):
    with_rows(model, 300)
    with pytest.raises(
        ModelLoadError, match=r"makes tokens that the model has no embedding for \('.*' is 3\d\d, "
    ) as e:
        load(model)
    assert "the model has 300" in str(e.value)
    assert str(model) in str(e.value)
    assert "\n" not in str(e.value)


def test_an_added_token_without_a_row_is_told_of(model):
    with_token(model, "<pad>", 384)
    with pytest.warns(UserWarning, match=r"1 tokens of the tokenizer of .* have no embedding .* \('<pad>' is 384\)"):
        encoder = load(model)
    assert torch.equal(encoder.encode(TEXTS), load_quietly(FOLDER / "llama").encode(TEXTS))


def test_padding_takes_another_token_where_the_pad_token_has_no_row(model):
    with_token(model, "<pad>", 384)
    encoder = load_quietly(model)
    encoder.tokenizer.pad_token = "<pad>"
    ids = encoder.tokenize(TEXTS)
    assert int(ids["input_ids"].max()) < 384
    assert encoder(ids).shape == (len(TEXTS), 64)


def test_an_unknown_token_that_every_text_begins_with_is_refused(model):
    with_token(model, "<bos>", 384)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<bos>": {"id": "<bos>", "ids": [384], "tokens": ["<bos>"]}},
    }
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelLoadError, match="'<bos>' is 384"):
        load(model)


def test_padding_that_a_tokenizer_file_asks_for_is_no_token_of_a_text(model):
    with_token(model, "<pad>", 384)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["padding"] = {
        "strategy": {"Fixed": 32}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 384, "pad_type_id": 0,
        "pad_token": "<pad>",
    }  # fmt: skip
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.warns(UserWarning, match="1 tokens of the tokenizer"):
        load(model)


def test_ordinary_tokens_that_no_text_comes_to_are_told_of(model):
    """Some vocabularies are padded in the tokenizer, with names that its merges never make."""
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["<unused0>"] = 384
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.warns(UserWarning, match="'<unused0>' is 384"):
        load(model)


def stated(folder: Path, tokenizer_class: str, **settings: object) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": tokenizer_class, **settings}))


@pytest.mark.parametrize("begin", [None, True, False])
@pytest.mark.parametrize("kind", ["LlamaTokenizer", "LlamaTokenizerFast"])
def test_begin_and_end_tokens_that_the_configuration_states_are_added(model, kind, begin):
    """e5-mistral: add_eos_token is true, tokenizer.json adds <s> alone. transformers 4.57 gave <s> text </s>."""
    stated(model, kind, add_eos_token=True, **({} if begin is None else {"add_bos_token": begin}))
    encoder = load(model)
    (plain,) = load(FOLDER / "llama").text_tokenizer()([("", TEXTS[0])]).ids
    (ids,) = encoder.text_tokenizer()([("", TEXTS[0])]).ids
    assert ids.tolist() == [*plain.tolist()[0 if begin is not False else 1 :], encoder.tokenizer.eos_token_id]


def test_last_token_pooling_takes_the_stated_end_token_and_a_saved_encoder_too(model, tmp_path):
    stated(model, "LlamaTokenizer", add_eos_token=True)
    encoder = LLM2Vec.from_pretrained(model, dtype="float32", device="cpu", pooling_mode="last_token")
    tokens = encoder.encode(TEXTS[0], output="tokens")
    assert int(tokens.ids[-1]) == encoder.tokenizer.eos_token_id
    assert torch.allclose(encoder.encode(TEXTS[0]), tokens.embeddings[-1], atol=1e-5)
    encoder.save(tmp_path / "saved")
    assert torch.equal(load(tmp_path / "saved").encode(TEXTS), encoder.encode(TEXTS))


def test_a_stated_end_token_that_transformers_never_added_is_told_of(model):
    """Llama 3's PreTrainedTokenizerFast passed over these settings in transformers 4, too."""
    stated(model, "PreTrainedTokenizerFast", add_eos_token=True)
    with pytest.warns(UserWarning, match=r"says add_eos_token, but its tokenizer.json adds none"):
        encoder = load(model)
    assert torch.equal(encoder.encode(TEXTS), load(FOLDER / "llama").encode(TEXTS))


def test_a_stated_token_that_has_no_name_is_refused(model):
    stated(model, "LlamaTokenizer", add_eos_token=True, eos_token=None)
    content = json.loads((model / "special_tokens_map.json").read_text())
    (model / "special_tokens_map.json").write_text(json.dumps({**content, "eos_token": None}))
    with pytest.raises(ModelLoadError, match="says add_eos_token, and the tokenizer names no eos_token"):
        load(model)


def load_quietly(place) -> LLM2Vec:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load(place)
