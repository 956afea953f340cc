"""Against the original implementation's numbers: tokens, hidden states, pooling modes, adapters; and its defects."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from reference_data import (
    ARCHITECTURES,
    COUNTED_RIGHT,
    FOLDER,
    INPUTS,
    INSTRUCTION,
    MISCOUNTED,
    TEXTS,
    arrays,
    assert_matches,
)

from llm2vec_fast.encoder import LLM2Vec
from llm2vec_fast.errors import UserError

MODES = ("mean", "weighted_mean", "eos_token", "last_token", "bos_token")
pytestmark = pytest.mark.parametrize("architecture", ARCHITECTURES)


def load(architecture: str, *adapter: str, **settings) -> LLM2Vec:
    return LLM2Vec.from_pretrained(
        FOLDER / architecture, *(FOLDER / name for name in adapter), dtype="float32", device="cpu", **settings
    )


def text_rows(architecture: str, kind: str, row: int, count: int) -> np.ndarray:
    """The reference's last hidden states of the last ``count`` tokens of a text."""
    key = "hs|instr|sdpa|bi" if kind == "instr" else "last|plain|sdpa|bi"
    states = arrays(architecture)[key]
    return (states[-1] if kind == "instr" else states)[row, -count:]


@pytest.mark.parametrize("kind", INPUTS)
def test_token_ids(architecture, kind):
    expected = arrays(architecture)
    tokens = load(architecture).tokenize(INPUTS[kind])
    for name in ("input_ids", "attention_mask"):
        assert np.array_equal(tokens[name], expected[f"tok|{kind}|{name}"])


def test_the_text_begins_where_its_first_character_is(architecture):
    """The original counts the text's tokens alone, so it misses one where the prompt changes how they are split."""
    ours = load(architecture).tokenize(INPUTS["instr"])["embed_mask"].numpy()
    theirs = arrays(architecture)["tok|instr|embed_mask"]
    assert np.array_equal(ours[COUNTED_RIGHT], theirs[COUNTED_RIGHT])
    assert ours[MISCOUNTED].sum() == theirs[MISCOUNTED].sum() + 1


def test_without_a_prompt_no_token_is_left_out(architecture):
    """The original leaves out the begin token as if it were an instruction."""
    tokens = load(architecture).tokenize(TEXTS)
    assert torch.equal(tokens["embed_mask"], tokens["attention_mask"])


def test_hidden_states_of_every_layer(architecture):
    encoder = load(architecture)
    tokens = encoder.tokenize(INPUTS["instr"])
    with torch.no_grad():
        out = encoder.model(tokens["input_ids"], attention_mask=tokens["attention_mask"], output_hidden_states=True)
    states, real = torch.stack(out.hidden_states).numpy(), tokens["attention_mask"].numpy().astype(bool)
    assert_matches(states[:, real], arrays(architecture)["hs|instr|sdpa|bi"][:, real])


@pytest.mark.parametrize("direction", ["bi", "uni"])
@pytest.mark.parametrize("kind", INPUTS)
def test_hidden_states_of_packed_texts(architecture, kind, direction):
    encoder = load(architecture, enable_bidirectional=direction == "bi", skip_instruction=False)
    packed = encoder.encode(INPUTS[kind], output="tokens", convert_to_numpy=True)
    expected = arrays(architecture)
    states = expected["hs|instr|sdpa|bi"][-1] if (kind, direction) == ("instr", "bi") else None
    states = expected[f"last|{kind}|sdpa|{direction}"] if states is None else states
    for ours, theirs in zip(packed, states, strict=True):
        assert_matches(ours.embeddings, theirs[-len(ours.ids) :])


@pytest.mark.parametrize("skip", [False, True], ids=["whole", "skip"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", INPUTS)
def test_embeddings(architecture, kind, mode, skip):
    encoder = load(architecture, pooling_mode=mode, skip_instruction=skip)
    expected = arrays(architecture)[f"emb|{kind}|{mode}|skip{int(skip and kind == 'instr')}"]
    ours = encoder.encode(INPUTS[kind], convert_to_numpy=True)
    if kind == "instr" and skip and "mean" in mode:
        rows = text_rows(architecture, kind, MISCOUNTED, 5)
        weights = np.ones(5) if mode == "mean" else np.arange(1, 6)
        assert_matches(ours[MISCOUNTED], (weights / weights.sum()).astype(np.float32) @ rows)
        ours, expected = ours[COUNTED_RIGHT], expected[COUNTED_RIGHT]
    assert_matches(ours, expected)


@pytest.mark.parametrize("token_budget", [1, 90, 100_000])
def test_embeddings_do_not_depend_on_the_token_budget(architecture, token_budget):
    ours = load(architecture).encode(TEXTS, token_budget=token_budget, convert_to_numpy=True)
    assert_matches(ours, arrays(architecture)["emb|plain|mean|skip0"])


def test_a_causal_encoder(architecture):
    ours = load(architecture, enable_bidirectional=False).encode(INPUTS["instr"], convert_to_numpy=True)
    assert_matches(ours[COUNTED_RIGHT], arrays(architecture)["emb|edge|uni_mean"][COUNTED_RIGHT])


@pytest.mark.parametrize("merge", [False, True], ids=["separate", "merged"])
def test_adapters(architecture, merge):
    encoder = load(architecture, f"{architecture}-lora", merge_peft=merge)
    ours = encoder.encode(INPUTS["instr"], convert_to_numpy=True)
    assert_matches(ours[COUNTED_RIGHT], arrays(architecture)[f"emb|lora|merge{int(merge)}"][COUNTED_RIGHT])


def test_an_adapter_saved_merged(architecture, tmp_path):
    load(architecture, f"{architecture}-lora").save(tmp_path / "merged", merge_before_save=True)
    ours = LLM2Vec.from_pretrained(tmp_path / "merged", dtype="float32", device="cpu").encode(INPUTS["instr"])
    assert_matches(ours.numpy()[COUNTED_RIGHT], arrays(architecture)["emb|lora|saved_merged"][COUNTED_RIGHT])


def test_an_adapter_folder_as_the_base(architecture, tmp_path):
    """It names its own base and is merged into it, as published checkpoints are laid out."""
    folder = tmp_path / "adapter"
    shutil.copytree(FOLDER / f"{architecture}-lora", folder)
    config = (folder / "adapter_config.json").read_text()
    base = (FOLDER / architecture).as_posix()
    (folder / "adapter_config.json").write_text(config.replace(f'_path": "{architecture}"', f'_path": "{base}"'))
    encoder = LLM2Vec.from_pretrained(folder, dtype="float32", device="cpu")
    assert not hasattr(encoder.model, "peft_config")
    ours = encoder.encode(INPUTS["instr"], convert_to_numpy=True)
    assert_matches(ours[COUNTED_RIGHT], arrays(architecture)["emb|lora|merge1"][COUNTED_RIGHT])


def test_document_limit(architecture):
    ours = load(architecture, doc_max_length=10).encode(INPUTS["instr"], convert_to_numpy=True)
    assert_matches(ours[COUNTED_RIGHT], arrays(architecture)["emb|edge|doc_max_length10"][COUNTED_RIGHT])


def test_a_cut_text_is_pooled_without_its_instruction(architecture):
    """The original counts the tokens of the whole text, so the instruction's take the place of those that were cut."""
    encoder = load(architecture, max_length=40)
    tokens = load(architecture).tokenize(INPUTS["instr"][3:4])
    ids, width = tokens["input_ids"][:, :40], int(tokens["attention_mask"].sum() - tokens["embed_mask"].sum())
    with torch.no_grad():
        states = encoder.model(ids).last_hidden_state[0]
    ours = encoder.encode(INPUTS["instr"][3:4])[0]
    assert_matches(ours.numpy(), states[width:].mean(0).numpy())


def test_an_instruction_that_leaves_no_room_is_refused(architecture):
    with pytest.raises(UserError, match=r"sentences\[1\]: its instruction fills all of max_length=24 tokens"):
        load(architecture, max_length=24).encode([["short", "text"], [INSTRUCTION, "text"]])


def test_an_empty_text(architecture):
    """Alone it is its begin token; behind an instruction nothing is left to pool. The original averages padding."""
    encoder = load(architecture)
    begin = encoder.encode("", output="tokens", convert_to_numpy=True)
    alone, behind = encoder.encode(["", "longer than that"])[0], encoder.encode([[INSTRUCTION, ""]])[0]
    assert_matches(alone.numpy(), begin.embeddings[0])
    assert len(begin.ids) == 1
    assert not behind.any()


def test_a_begin_token_written_in_a_text_adds_no_row(architecture):
    encoder = load(architecture, pooling_mode="bos_token")
    assert encoder.encode(["a <s> b", "c"]).shape == (2, encoder.dimension)
