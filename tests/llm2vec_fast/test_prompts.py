"""Templates by checkpoint, end marks for eos_token pooling, instructions, and what is no sentence."""

from __future__ import annotations

import pytest

from llm2vec_fast.prompts import CHAT_TURNS, Prompted, Template, as_pairs, find_template

LLAMA_2 = {"</s>"}


def template(checkpoint="", model_type="llama", mode="mean", end_token="</s>", vocabulary=LLAMA_2) -> Template:
    return find_template(checkpoint, model_type, mode, end_token, vocabulary.__contains__)


@pytest.mark.parametrize("checkpoint", CHAT_TURNS)
def test_checkpoints_trained_with_a_chat_turn_get_one(checkpoint):
    opening, closing = CHAT_TURNS[checkpoint]
    joined = template(checkpoint).join("  Find the answer: ", " text  ")
    assert joined == Prompted(f"{opening}Find the answer:  text{closing}", len(opening) + len("Find the answer: "))


def test_without_a_template_the_text_stays_as_it_is():
    assert template().join("", " text\n") == Prompted(" text\n", 0)
    assert template().join(" \n", "text") == Prompted("text", 0)
    assert template().join("Query:", "text") == Prompted("Query: text", 7)


@pytest.mark.parametrize(
    ("checkpoint", "model_type", "vocabulary", "closing"),
    [
        ("", "llama", {"</s>"}, " </s>"),
        ("", "mistral", {"</s>"}, " </s>"),
        ("", "gemma", {"<eos>"}, "<eos>"),
        ("", "qwen2", {"<|endoftext|>"}, "<|endoftext|>"),
        ("meta-llama/Meta-Llama-3-8B", "llama", {"<|end_of_text|>"}, "<|end_of_text|>"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "llama", {"<|end_of_text|>"}, "<|eot_id|>"),
        ("mistralai/Mistral-7B-Instruct-v0.2", "mistral", {"</s>"}, " [/INST] </s>"),
        ("", "llama", {"<|im_end|>"}, "<END>"),  # the table's mark is no token here: the tokenizer's own is
        ("", "qwen3", {"</s>"}, "<END>"),
    ],
)
def test_end_marks(checkpoint, model_type, vocabulary, closing):
    found = template(checkpoint, model_type, "eos_token", "<END>", vocabulary)
    assert found.closing == closing
    assert template(checkpoint, model_type, "mean", "<END>", vocabulary).closing in (
        "",
        CHAT_TURNS.get(checkpoint, ("", ""))[1],
    )


def test_a_tokenizer_without_an_end_token_adds_none():
    assert template(model_type="qwen3", mode="eos_token", end_token=None) == Template()


def test_pairs():
    assert as_pairs(["a", ["i", "b"], ("", "c")]) == [("", "a"), ("i", "b"), ("", "c")]
    assert as_pairs(["a", "b"], "i") == [("i", "a"), ("i", "b")]
    assert as_pairs([]) == []


@pytest.mark.parametrize("item", [None, 3, ["only one"], ["a", "b", "c"], ["a", 1], b"bytes", {"a": "b"}])
def test_what_is_no_sentence_is_refused_by_position(item):
    with pytest.raises(TypeError, match=r"sentences\[1\] is .*: pass a string or a pair"):
        as_pairs(["fine", item])


def test_two_instructions_are_refused():
    with pytest.raises(ValueError, match=r"sentences\[0\] brings its own instruction"):
        as_pairs([["i", "a"]], "j")
