"""Rope types whose frequencies depend on a text's length: its own, whatever is packed or padded beside it."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from reference_data import FOLDER
from tiny_models import SHAPE, tiny_model
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llm2vec_fast.acceleration import accelerate, restore
from llm2vec_fast.bidirectional import UnsupportedModelError, make_bidirectional
from llm2vec_fast.encoder import LLM2Vec
from llm2vec_fast.kernels.layout import SequenceLayout

PUBLISHED_TOLERANCE = 1e-4
CONTEXT = 16  # tokens beyond which a text is a long one
LENGTHS = (13, 1, 40, 16, 17, 30, 7)
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 4.0, 8.0, 16.0],
    "original_max_position_embeddings": CONTEXT,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
HALF = {"short_factor": [1.0, 1.5], "long_factor": [3.0, 9.0], "partial_rotary_factor": 0.5}
EXPERTS = {"num_local_experts": 2, "sliding_window": None}
CASES = {
    "phi3-longrope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": CONTEXT}),
    "phi3-partial": (
        "phi3",
        {
            "rope_parameters": {**LONGROPE, **HALF},
            "original_max_position_embeddings": CONTEXT,
            "partial_rotary_factor": 0.5,
        },
    ),
    "llama-longrope": ("llama", {"rope_parameters": LONGROPE}),
    "llama-dynamic": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": CONTEXT}),
    "gemma3-by-layer": (
        "gemma3",
        {
            "rope_parameters": {"full_attention": LONGROPE, "sliding_attention": DYNAMIC},
            "max_position_embeddings": CONTEXT,
        },
    ),
    "phimoe-scales-too": (
        "phimoe",
        {"rope_parameters": {**LONGROPE, "short_mscale": 1.2, "long_mscale": 1.5}, **EXPERTS},
    ),
}


def model_of(case: str) -> PreTrainedModel:
    family, changes = CASES[case]
    return tiny_model(family, **copy.deepcopy(changes))


def texts(lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, SHAPE["vocab_size"], (n,), generator=generator) for n in lengths]


def stock_alone(case: str) -> list[Tensor]:
    """The definition: a stock model that has seen no other text."""
    found = []
    for ids in texts():
        model = model_of(case)
        model.config.is_causal = False
        with torch.no_grad():
            found.append(model(input_ids=ids[None], use_cache=False).last_hidden_state[0])
    return found


def packed(model: nn.Module, batch: list[Tensor], **more: Tensor) -> list[Tensor]:
    lengths = [len(ids) for ids in batch]
    layout = SequenceLayout.from_lengths(lengths)
    hidden = model(input_ids=torch.cat(batch)[None], layout=layout, **more).last_hidden_state[0]
    return list(hidden.split(lengths))


def padded(model: nn.Module, batch: list[Tensor], left: bool, own_positions: bool) -> list[Tensor]:
    """As stock users pad: positions given count the padding, too."""
    width = max(map(len, batch)) + 9
    ids, mask = torch.zeros(2, len(batch), width, dtype=torch.long)
    for row, text in enumerate(batch):
        where = slice(width - len(text), width) if left else slice(0, len(text))
        ids[row, where], mask[row, where] = text, 1
    positions = {} if own_positions else {"position_ids": torch.arange(width)[None]}
    hidden = model(input_ids=ids, attention_mask=mask, **positions).last_hidden_state
    return [hidden[row][mask[row].bool()] for row in range(len(batch))]


LAYOUTS = {
    "packed": packed,
    "packed-by-positions": lambda model, batch: list(
        model(
            input_ids=torch.cat(batch)[None], position_ids=torch.cat([torch.arange(len(x)) for x in batch])[None]
        ).last_hidden_state[0].split([len(x) for x in batch])
    ),
    "packed-positions-run-on": lambda model, batch: packed(
        model, batch, position_ids=torch.arange(sum(map(len, batch)))[None]
    ),
    "right-padded": lambda model, batch: padded(model, batch, left=False, own_positions=True),
    "right-padded-positions-given": lambda model, batch: padded(model, batch, left=False, own_positions=False),
    "left-padded-positions-given": lambda model, batch: padded(model, batch, left=True, own_positions=False),
}  # fmt: skip


def assert_all_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine - other).abs().max() <= PUBLISHED_TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_each_text_has_the_rope_of_its_own_length(case: str) -> None:
    model, expected = make_bidirectional(model_of(case)), stock_alone(case)
    with torch.no_grad():
        for run in LAYOUTS.values():
            assert_all_equal(run(model, texts()), expected)
        accelerate(model)
        assert_all_equal(packed(model, texts()), expected)


def test_an_embedding_does_not_depend_on_a_long_text_beside_it() -> None:
    """Through `encode`, which packs."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "llama")
    family, changes = CASES["phi3-longrope"]
    model = tiny_model(family, vocab_size=384, **copy.deepcopy(changes))
    assert model.config.rope_parameters["original_max_position_embeddings"] == CONTEXT  # phi3 has its own idea of it
    encoder = LLM2Vec(make_bidirectional(model), tokenizer)
    short, long = "a short text", "a text that is longer than the context of the model " * 3
    alone = encoder.encode(short)
    assert (encoder.encode([short, long])[0] - alone).abs().max() <= PUBLISHED_TOLERANCE
    assert (encoder.encode(short) - alone).abs().max() <= PUBLISHED_TOLERANCE


@pytest.mark.parametrize("case", ["phi3-longrope", "llama-dynamic"])
def test_training_has_the_gradients_of_texts_one_at_a_time(case: str) -> None:
    theirs = model_of(case)
    theirs.config.is_causal = False
    for ids in texts():
        alone = model_of(case)
        alone.config.is_causal = False
        alone.load_state_dict(theirs.state_dict())
        alone(input_ids=ids[None], use_cache=False).last_hidden_state.square().sum().backward()
        for total, part in zip(theirs.parameters(), alone.parameters(), strict=True):
            total.grad = part.grad if total.grad is None else total.grad + part.grad
    ours = make_bidirectional(model_of(case)).train()
    with torch.inference_mode():  # an embedding in between leaves nothing behind
        packed(ours, texts())
    ours.gradient_checkpointing_enable()
    torch.cat(packed(ours, texts())).square().sum().backward()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-3, atol=1e-3 * other.grad.abs().max().item())


def test_threads_do_not_change_each_others_rope() -> None:
    model, expected = make_bidirectional(model_of("llama-dynamic")), stock_alone("llama-dynamic")

    def run(seed: int) -> None:
        order = torch.randperm(len(LENGTHS), generator=torch.Generator().manual_seed(seed)).tolist()[:3]
        with torch.no_grad():
            assert_all_equal(packed(model, [texts()[i] for i in order]), [expected[i] for i in order])

    with ThreadPoolExecutor(4) as executor:
        list(executor.map(run, range(24)))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_clones_and_saved_models_keep_it(clone, tmp_path) -> None:
    model, expected = make_bidirectional(model_of("phi3-longrope")), stock_alone("phi3-longrope")
    with torch.no_grad():
        assert_all_equal(packed(clone(model), texts()), expected)
    assert set(model.state_dict()) == set(model_of("phi3-longrope").state_dict())
    model.save_pretrained(tmp_path)
    again = make_bidirectional(type(model).from_pretrained(tmp_path))
    with torch.no_grad():
        assert_all_equal(packed(again, texts()), expected)


def test_a_model_that_ran_long_texts_before_starts_afresh() -> None:
    model, expected = model_of("llama-dynamic"), stock_alone("llama-dynamic")
    with torch.no_grad():
        model(input_ids=texts()[2][None])
        assert_all_equal(packed(make_bidirectional(model), texts()), expected)


def test_restoring_gives_the_stock_module_back() -> None:
    model, stock = model_of("gemma3-by-layer"), model_of("gemma3-by-layer")
    accelerate(model)
    restore(model)
    assert model.rotary_emb.rope_type == stock.rotary_emb.rope_type
    assert not model.rotary_emb._forward_hooks
    assert not list(model.rotary_emb.children())
    ids = texts()[2][None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).last_hidden_state, stock(input_ids=ids).last_hidden_state)


def test_a_compiled_graph_holds_long_and_short_texts_at_once() -> None:
    rotary = make_bidirectional(model_of("phi3-longrope")).rotary_emb
    compiled = torch.compile(rotary, fullgraph=True, dynamic=True, backend="eager")
    for lengths in (LENGTHS, LENGTHS[:2], LENGTHS[2:]):
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        x = torch.zeros(*positions.shape, SHAPE["hidden_size"])
        for ours, plain in zip(compiled(x, positions), rotary(x, positions), strict=True):
            assert torch.equal(ours, plain)


@pytest.mark.parametrize("rope_type", sorted({"default", *ROPE_INIT_FUNCTIONS} - {"dynamic", "longrope"}))
def test_rope_types_that_do_not_depend_on_length_stay_as_they_are(rope_type: str) -> None:
    parameters = {
        "rope_type": rope_type, "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": CONTEXT,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    }  # fmt: skip
    model = make_bidirectional(tiny_model("llama", rope_parameters=parameters))
    assert not model.rotary_emb._forward_hooks
    with torch.no_grad():
        together, alone = packed(model, texts())[0], packed(model, texts()[:1])[0]
    assert (together - alone).abs().max() <= PUBLISHED_TOLERANCE


class OwnRotary(nn.Module):
    """As remote code has it: the longest position of the batch decides, and nothing tells that from outside."""

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.dimension = dimension

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        base = 10000.0 if position_ids.max() < CONTEXT else 50000.0
        angles = position_ids[..., None] * base ** -(torch.arange(0, self.dimension, 2) / self.dimension)
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def test_a_rotary_embedding_of_unknown_code_that_looks_at_the_longest_text_is_refused() -> None:
    model = tiny_model("llama")
    model.rotary_emb = OwnRotary(SHAPE["head_dim"])
    with pytest.raises(
        UnsupportedModelError, match=r"LlamaModel \(model type llama\) has a rotary embedding, OwnRotary"
    ):
        make_bidirectional(model)


def test_a_rope_type_by_length_of_unknown_make_is_refused_and_the_model_left_as_it_was() -> None:
    model = tiny_model("llama")
    model.rotary_emb.rope_type = "dynamic_of_my_own"
    del model.rotary_emb.original_inv_freq
    with pytest.raises(UnsupportedModelError, match=r"LlamaRotaryEmbedding has the rope type 'dynamic_of_my_own'"):
        make_bidirectional(model)
    assert model.config._attn_implementation == "eager"
    assert "is_causal" not in vars(model.config)
