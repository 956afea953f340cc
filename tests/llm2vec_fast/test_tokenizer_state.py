"""What a tokenizer.json says, what calls leave behind and what other threads do has no part in a text's tokens."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from reference_data import FOLDER
from tokenizers import AddedToken, Tokenizer, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from llm2vec_fast.encoder import LLM2Vec
from llm2vec_fast.prompts import Template
from llm2vec_fast.tokenization import TextTokenizer
from llm2vec_fast.tokenizer_state import own_backend
from llm2vec_fast.training.texts import tokenise

LONG = "the quick brown fox jumps over the lazy dog " * 9
PADDING = {
    "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
    "pad_token": "<unk>",
}  # fmt: skip
TRUNCATION = {"direction": "Left", "max_length": 8, "strategy": "LongestFirst", "stride": 0}


def folder(path: Path, **changes: object) -> Path:
    """The reference checkpoint with another tokenizer.json."""
    shutil.copytree(FOLDER / "llama", path)
    file = path / "tokenizer.json"
    saved = json.loads(file.read_text(encoding="utf-8"))
    for name, value in changes.items():
        saved[name] = {**saved[name], **value} if name == "model" else value
    file.write_text(json.dumps(saved), encoding="utf-8")
    return path


def load(path: Path, **settings: object) -> LLM2Vec:
    return LLM2Vec.from_pretrained(path, dtype="float32", device="cpu", max_length=60, **settings)


def ids_of(tokenizer: PreTrainedTokenizerBase, text: str = LONG, max_length: int = 512) -> list[int]:
    return TextTokenizer(tokenizer, Template(), max_length, max_length)([("", text)]).ids[0].tolist()


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(FOLDER / "llama")


@pytest.mark.parametrize(
    "state",
    [
        {"padding": PADDING},
        {"truncation": TRUNCATION},
        {"padding": PADDING, "truncation": {**TRUNCATION, "max_length": 1}},
        {"model": {"dropout": 0.5}},
    ],
    ids=["padding", "truncation", "both", "dropout"],
)
def test_every_encode_is_that_of_a_plain_tokenizer_json(state: dict, tmp_path: Path) -> None:
    texts = [LONG, "short", "", ["Find it:", LONG]]
    encoder = load(folder(tmp_path / "model", **state))
    left = encoder.tokenizer.backend_tokenizer.padding, encoder.tokenizer.backend_tokenizer.truncation
    expected = load(FOLDER / "llama").encode(texts)
    for _ in range(2):
        assert torch.equal(encoder.encode(texts), expected)
    assert (encoder.tokenizer.backend_tokenizer.padding, encoder.tokenizer.backend_tokenizer.truncation) == left


def test_calls_of_the_users_tokenizer_in_other_threads_do_not_matter(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.pad_token = tokenizer.eos_token
    expected, running = ids_of(tokenizer), [True]

    def use() -> None:
        while running:
            tokenizer(LONG, truncation=True, max_length=5, padding="max_length")
            tokenizer(["a", "b c d"], padding=True, split_special_tokens=True)

    with ThreadPoolExecutor(2) as executor:
        other = executor.submit(use)
        try:
            found = list(executor.map(lambda _: ids_of(tokenizer), range(60)))
        finally:
            running.clear()
        other.result()
    assert all(ids == expected for ids in found)


def test_what_a_call_leaves_on_the_tokenizer_does_not_matter(tokenizer: PreTrainedTokenizerBase) -> None:
    expected = ids_of(tokenizer, "a </s> b")
    tokenizer("x", split_special_tokens=True, truncation=True, max_length=2)
    assert ids_of(tokenizer, "a </s> b") == expected
    tokenizer.split_special_tokens = True  # this is no call's but the tokenizer's own setting
    assert ids_of(tokenizer, "a </s> b") == tokenizer("a </s> b")["input_ids"] != expected


def test_changes_of_the_tokenizer_are_noticed(tokenizer: PreTrainedTokenizerBase) -> None:
    def same() -> bool:
        return ids_of(tokenizer, "one zebra") == tokenizer("one zebra")["input_ids"]

    seen = [ids_of(tokenizer, "one zebra")]
    assert same()
    for change in (
        lambda: tokenizer.add_tokens([AddedToken("zebra", lstrip=True)]),
        lambda: setattr(tokenizer, "add_eos_token", True),
        lambda: setattr(tokenizer, "add_bos_token", True),
        lambda: setattr(tokenizer.backend_tokenizer, "normalizer", normalizers.Replace("o", "a")),
    ):
        change()
        assert same()
        seen.append(ids_of(tokenizer, "one zebra"))
    assert len({tuple(ids) for ids in seen}) == len(seen)


def test_it_is_made_once_and_again_after_a_change(tokenizer: PreTrainedTokenizerBase) -> None:
    own = own_backend(tokenizer)
    assert own is not tokenizer.backend_tokenizer
    assert own_backend(tokenizer) is own
    tokenizer.add_tokens(["zebra"])
    assert own_backend(tokenizer) is not own


def test_added_tokens_keep_their_ids_and_rules(tokenizer: PreTrainedTokenizerBase) -> None:
    added = [
        AddedToken(f"<x{i}>", special=i % 2 == 0, lstrip=i % 3 == 0, rstrip=i % 5 == 0, single_word=i % 7 == 0)
        for i in range(40)
    ]
    tokenizer.add_tokens(added)
    text = " ".join(f"a <x{i}>  b<x{i}>c <s>" for i in range(40))
    assert own_backend(tokenizer).encode(text).ids == tokenizer(text)["input_ids"]


def test_a_vocabulary_without_the_letter_a_is_cut_to_length() -> None:
    """Nothing is learnt about a tokenizer from a text of ours, which it may not know."""
    backend = Tokenizer(models.WordLevel({"ja": 0, "nein": 1}))
    backend.normalizer = normalizers.Replace("a", "")
    backend.pre_tokenizer = None
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert np.array_equal(ids_of(tokenizer, "nein", max_length=1), [1])


def test_training_leaves_the_tokenizer_as_it_was(tokenizer: PreTrainedTokenizerBase) -> None:
    """What a call sets would be saved with the trained model, and cut the texts of whoever loads it."""
    before = tokenizer.backend_tokenizer.to_str()
    rows = Dataset.from_dict({"text": ["a text of some tokens"] * 3})
    assert len(tokenise(rows, tokenizer, 4, line_by_line=True)[0]["input_ids"]) == 4
    assert tokenizer.backend_tokenizer.to_str() == before
