"""Tokens of whole texts, cut texts, very long texts; where the text begins; character offsets."""

from __future__ import annotations

import re
import time

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference_data import FOLDER
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from llm2vec_fast.encoder import LLM2Vec
from llm2vec_fast.errors import UserError
from llm2vec_fast.prompts import Template
from llm2vec_fast.tokenization import TextTokenizer, TokenizedTexts, check_room

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
    without_offsets = TextTokenizer(tokenizer, NO_TEMPLATE, 5, 400)([("", "a b c d e f g")])
    assert without_offsets.ids[0].tolist() == expected
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


CLOSINGS = {
    "mark": (BYTE_LEVEL, Template("", " </s>")),
    "turn": (BYTE_LEVEL, Template("[INST] ", " [/INST]")),
    "turn-and-mark": (BYTE_LEVEL, Template("<s>user\n", " [/INST] </s>")),
    "and-an-end-token": (metaspace(), Template("", " dead</s>")),
}


def behind(instruction: str, template: Template, tokenizer: PreTrainedTokenizerBase = BYTE_LEVEL) -> list[int]:
    """Tokens behind a text, which an empty one has, too."""
    empty = tokenise([(instruction, "")], 100_000, 100_000, template, tokenizer)
    return empty.ids[0][empty.skip[0] :].tolist()


@pytest.mark.parametrize("name", CLOSINGS)
@settings(deadline=None, max_examples=25)
@given(instruction=st.sampled_from(["bad ace:", "fa ce"]), document=DOCUMENTS, max_length=st.integers(44, 70))
def test_what_closes_a_text_is_never_cut(name, instruction, document, max_length):
    """The text gives way: the tokens are the first of the whole text's, then all of those behind the text."""
    tokenizer, template = CLOSINGS[name]
    document = document if tokenizer is BYTE_LEVEL else "ab ja fe " * len(document)
    whole = tokenise([(instruction, document)], 100_000, 100_000, template, tokenizer).ids[0].tolist()
    cut = tokenise([(instruction, document)], max_length, 400, template, tokenizer)
    ids, closing = cut.ids[0].tolist(), behind(instruction, template, tokenizer)
    assert not cut.lost[0]
    assert len(ids) == min(len(whole), max_length)
    assert ids[-len(closing) :] == closing
    assert ids[: len(ids) - len(closing) - 1] == whole[: len(ids) - len(closing) - 1]  # one may cross into the closing


@pytest.mark.parametrize("limits", [(512, 12), (40, 12), (40, 400)])
@pytest.mark.parametrize("instruction", ["", "bad ace:"])
def test_what_closes_a_text_is_kept_by_each_limit(instruction, limits):
    for tokenizer, template in CLOSINGS.values():
        (ids,) = tokenise([(instruction, "dab cab " * 60)], *limits, template, tokenizer).ids
        closing = behind("a", template, tokenizer)
        assert ids[-len(closing) :].tolist() == closing
        assert len(ids) <= limits[0]


@pytest.mark.parametrize("characters", [3000, 100_000])
@pytest.mark.parametrize("text", ["the quick brown fox ", "x", "山 ", " "])
def test_what_closes_a_very_long_text_is_kept_and_covers_none_of_it(text, characters):
    template = Template("[INST] ", " [/INST] </s>")
    long = text * (characters // len(text))
    tokens = tokenise([("Find it:", long)], 40, 400, template)
    closing = behind("Find it:", template)
    assert tokens.ids[0][-len(closing) :].tolist() == closing
    assert tokens.lengths[0] == 40 or not text.strip()
    first, last = tokens.offsets[0][-len(closing) :].T
    assert np.array_equal(first, last)


def test_an_end_mark_is_pooled_where_a_text_is_cut():
    """Through the encoder, in use and in training."""
    encoder = LLM2Vec.from_pretrained(
        FOLDER / "llama", pooling_mode="eos_token", max_length=24, dtype="float32", device="cpu"
    )
    text = "the quick brown fox jumps over the lazy dog " * 5
    tokens = encoder.encode(text, output="tokens")
    assert tokens.ids[-1] == BYTE_LEVEL.eos_token_id
    assert torch.equal(encoder.encode(text), tokens.embeddings[-1])
    trained = encoder.tokenize([text, "short"])
    assert trained["input_ids"][:, -1].tolist() == [BYTE_LEVEL.eos_token_id] * 2
    assert torch.allclose(encoder(trained)[0], tokens.embeddings[-1], atol=1e-4)


@pytest.mark.parametrize(
    ("max_length", "pair", "says"),
    [
        (6, ("Find what answers it:", "text"), r"sentences\[3\]: its instruction fills all of max_length=6"),
        (6, ("Find what answers it:", ""), r"sentences\[3\]: its instruction fills all of max_length=6"),
        (2, ("", "text"), r"sentences\[3\]: what the model's format puts around it fills all of max_length=2"),
    ],
    ids=["instruction", "no-text", "closing"],
)
def test_a_text_of_which_nothing_would_be_left_is_refused(max_length, pair, says):
    tokens = tokenise([pair], max_length, 400, Template("", " </s>"))
    with pytest.raises(UserError, match=says):
        check_room(tokens, [pair], 3, max_length)
    enough = tokenise([pair], 40, 400, Template("", " </s>"))
    check_room(enough, [pair], 3, 40)


@pytest.mark.parametrize("limits", [(0, 400), (512, 0), (512, -1), (2.5, 400)])
def test_limits_that_are_no_token_counts_are_refused(limits):
    with pytest.raises(ValueError, match="is not a positive number of tokens"):
        tokenise([("", "a")], *limits)
