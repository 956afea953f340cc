"""Tokens of whole texts, cut texts, very long texts; where the text begins; character offsets."""

from __future__ import annotations

import re
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference_data import FOLDER
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from llm2vec_fast.prompts import Template
from llm2vec_fast.tokenization import TextTokenizer, TokenizedTexts

NO_TEMPLATE = Template()
BYTE_LEVEL = AutoTokenizer.from_pretrained(FOLDER / "llama")
WORDS = st.sampled_from(
    ["the", "protein", "summit", "of", "a", "mountain's,", "naïve", "山の上", "e=mc2", "<s>", "</s>", "(((", "1234567"]
)
DOCUMENTS = st.lists(st.tuples(WORDS, st.sampled_from([" ", "  ", "\n", "\t ", "\u3000"])), max_size=80).map(
    lambda parts: "".join(word + space for word, space in parts)
)


def metaspace() -> PreTrainedTokenizerBase:
    """Splits as Llama-2 and Mistral do: a word's token covers the space before it. Ends every text with a token."""
    letters = {f"▁{c}": i + 3 for i, c in enumerate("abcdefghij")} | {c: i + 13 for i, c in enumerate("abcdefghij▁")}
    backend = Tokenizer(models.BPE(
        {"<unk>": 0, "<s>": 1, "</s>": 2, **letters}, [("▁", c) for c in "abcdefghij"], unk_token="<unk>"
    ))  # fmt: skip
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def tokenise(pairs, max_length=512, doc_max_length=400, template=NO_TEMPLATE, tokenizer=BYTE_LEVEL) -> TokenizedTexts:
    return TextTokenizer(tokenizer, template, max_length, doc_max_length)(pairs, with_offsets=True)


def by_definition(instruction: str, text: str, max_length: int, doc_max_length: int) -> list[int]:
    """The rule in its plainest form: drop words until the text alone fits, then put the instruction before it."""

    def count(document: str) -> int:
        options = {"truncation": True, "max_length": max_length, "add_special_tokens": False}
        return len(BYTE_LEVEL(document, **options)["input_ids"])

    while (tokens := count(text)) > doc_max_length:
        words = text.split()
        text = " ".join(words[: int(len(words) * doc_max_length / tokens)])
    joined = f"{instruction} {text}" if instruction else text
    return BYTE_LEVEL(joined, truncation=True, max_length=max_length)["input_ids"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    instruction=st.sampled_from(["", "Given a query, find what answers it:"]),
    documents=st.lists(DOCUMENTS, min_size=1, max_size=4),
    limits=st.sampled_from([(512, 400), (64, 40), (60, 20), (40, 40), (30, 100)]),
)
def test_ids_are_those_of_the_plain_rule(instruction, documents, limits):
    ours = tokenise([(instruction, document) for document in documents], *limits)
    for ids, document in zip(ours.ids, documents, strict=True):
        expected = by_definition(instruction, document, *limits)
        if len(expected) > 1 or not document.strip():  # where the plain rule leaves nothing, see the next test
            assert ids.tolist() == expected


@pytest.mark.parametrize("text", ["山の上" * 500, "x" * 3000, "first " + "y" * 3000])
def test_a_text_without_spaces_is_cut_not_emptied(text):
    tokens = tokenise([("", text)], max_length=300, doc_max_length=50)
    kept = BYTE_LEVEL.decode(tokens.ids[0], skip_special_tokens=True)
    assert 40 <= tokens.lengths[0] <= 51
    assert text.startswith(kept.rstrip("\ufffd"))


@pytest.mark.parametrize("limits", [(512, 400), (100, 400)])
@pytest.mark.parametrize("instruction", ["", "Find it:"])
def test_a_very_long_text_has_the_tokens_of_its_beginning(instruction, limits):
    text = "the quick brown fox jumps over the lazy dog near the river bank while the sun sets " * 250
    assert tokenise([(instruction, text)], *limits).ids[0].tolist() == by_definition(instruction, text, *limits)


def test_more_of_a_text_is_read_where_its_tokens_are_long():
    word = "w" * 100
    backend = Tokenizer(models.WordLevel({word: 0, "?": 1}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    text = f"{word} " * 1000
    tokens = tokenise([("", text)], max_length=300, tokenizer=PreTrainedTokenizerFast(tokenizer_object=backend))
    assert tokens.ids[0].tolist() == [0] * 300


@pytest.mark.parametrize("piece", ["word ", "a", " ", "\n", "=", "山", "ab\u00a0"])
def test_a_million_characters_take_no_longer_than_their_beginning(piece):
    text = piece * (1_000_000 // len(piece))
    start = time.process_time()
    tokens = tokenise([("Find it:", text)])
    assert tokens.lengths[0] <= 512
    # All of it would be 250,000 tokens or more; quadratic work would be minutes.
    assert time.process_time() - start < 5


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, metaspace()], ids=["byte-level", "metaspace"])
@pytest.mark.parametrize("instruction", ["", "bad ace:", "fa ce", "a"])
def test_the_text_begins_behind_its_prompt(tokenizer, instruction):
    pairs = [(instruction, text) for text in ("abc", "a b c", " gig", "j", "")]
    tokens = tokenise(pairs, tokenizer=tokenizer)
    for ids, skip, (_, text) in zip(tokens.ids, tokens.skip, pairs, strict=True):
        decoded = tokenizer.decode(ids[skip:], skip_special_tokens=True)
        assert re.sub("[ ▁]", "", decoded) == re.sub(" ", "", text)
        assert (skip == 0) == (instruction == "")


def test_a_prompt_that_swallows_the_first_character_of_the_text():
    """A token across the boundary covers text, so it belongs to the text."""
    backend = Tokenizer(models.BPE({"q": 0, ":": 1, " ": 2, "t": 3, " t": 4, ": ": 5}, [(":", " "), (" ", "t")]))
    backend.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    tokens = tokenise([("q:", "tt")], tokenizer=PreTrainedTokenizerFast(tokenizer_object=backend))
    assert tokens.ids[0].tolist() == [0, 5, 3, 3]
    assert tokens.skip.tolist() == [2]


def test_end_tokens_survive_truncation():
    tokenizer = metaspace()
    expected = tokenizer("a b c d e f g", truncation=True, max_length=5)["input_ids"]
    ours = tokenise([("", "a b c d e f g")], max_length=5, tokenizer=tokenizer)
    assert ours.ids[0].tolist() == expected == [1, 3, 4, 5, 2]
    assert ours.offsets[0].tolist() == [[0, 0], [0, 1], [1, 3], [3, 5], [0, 0]]


@pytest.mark.parametrize("doc_max_length", [400, 12], ids=["whole", "shortened"])
@pytest.mark.parametrize("instruction", ["", "Find  it:"])
def test_offsets_are_characters_of_the_text_as_given(instruction, doc_max_length):
    text = "  the quick\n\nbrown   fox jumps \t over the lazy dog, naïve 山の上 "
    template = Template("[INST] ", " [/INST]")
    tokens = tokenise([(instruction, text)], doc_max_length=doc_max_length, template=template)
    covered = np.zeros(len(text), dtype=bool)
    for (first, last), token in zip(tokens.offsets[0], tokens.ids[0], strict=True):
        assert 0 <= first <= last <= len(text)
        piece = BYTE_LEVEL.decode([token]).strip()
        if first < last and "\ufffd" not in piece:
            assert text[first:last].strip() == piece
        covered[first:last] = True
    last = int(covered.nonzero()[0].max()) + 1
    assert all(covered[i] or text[i].isspace() for i in range(last))
    assert doc_max_length == 12 or not text[last:].strip()


def test_half_a_surrogate_pair_is_read_as_the_replacement_character():
    broken, replaced = tokenise([("", "a \ud800 b"), ("", "a \ufffd b")]).ids
    assert np.array_equal(broken, replaced)


def test_settings_left_on_the_tokenizer_do_not_matter():
    expected = tokenise([("", "some text of several tokens")]).ids[0]
    BYTE_LEVEL.backend_tokenizer.enable_truncation(3)
    BYTE_LEVEL.backend_tokenizer.enable_padding(length=64)
    assert np.array_equal(tokenise([("", "some text of several tokens")]).ids[0], expected)


@pytest.mark.parametrize("limits", [(0, 400), (512, 0), (512, -1), (2.5, 400)])
def test_limits_that_are_no_token_counts_are_refused(limits):
    with pytest.raises(ValueError, match="is not a positive number of tokens"):
        tokenise([("", "a")], *limits)
