"""LLM2Vec.encode and forward as a user meets them, on a tiny random Llama."""

from __future__ import annotations

import copy
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from reference_data import FOLDER, INPUTS, INSTRUCTION, TEXTS
from torch.nn.functional import cosine_similarity
from transformers import AutoModel, AutoTokenizer

from llm2vec_fast import LLM2Vec
from llm2vec_fast.engine.plan import default_token_budget
from llm2vec_fast.errors import NonFiniteEmbeddingError, UserError
from llm2vec_fast.kernels import SequenceLayout

MANY = [f"{text} {number}" for number in range(30) for text in TEXTS]


def load(**settings) -> LLM2Vec:
    return LLM2Vec.from_pretrained(FOLDER / "llama", **{"dtype": "float32", "device": "cpu", **settings})


@pytest.fixture(scope="module")
def encoder() -> LLM2Vec:
    return load()


def assert_same_direction(ours: torch.Tensor, theirs: torch.Tensor, least: float = 0.99999) -> None:
    assert ours.shape == theirs.shape
    assert float(cosine_similarity(ours.double(), theirs.double(), dim=-1).min()) >= least


def test_shapes_and_types(encoder):
    one, none, some = encoder.encode(TEXTS[0]), encoder.encode([]), encoder.encode(tuple(TEXTS))
    assert (one.shape, none.shape, some.shape) == ((64,), (0, 64), (5, 64))
    assert all(x.dtype == torch.float32 and x.device.type == "cpu" and not x.is_inference() for x in (one, none, some))
    arrays = encoder.encode(TEXTS, convert_to_numpy=True)
    assert isinstance(arrays, np.ndarray)
    assert np.array_equal(arrays, some.numpy())
    assert torch.equal(one, encoder.encode([TEXTS[0]])[0])
    assert encoder.dimension == 64


def test_a_string_is_one_text_not_its_characters(encoder):
    assert_same_direction(encoder.encode("summit define"), encoder.encode(["summit define", "other"])[0])


def test_rows_come_back_in_order_whatever_shares_their_batch(encoder):
    together = encoder.encode(MANY, token_budget=300)
    alone = torch.stack([encoder.encode(text) for text in MANY])
    assert_same_direction(together, alone)


def test_the_same_call_gives_the_same_bits(encoder):
    assert torch.equal(encoder.encode(MANY), encoder.encode(MANY))


def test_more_texts_than_are_tokenised_at_a_time(encoder):
    texts = [f"text number {i}" for i in range(2500)]
    rows = encoder.encode(texts)
    picked = [0, 1023, 1024, 2047, 2048, 2499]
    assert_same_direction(rows[picked], torch.stack([encoder.encode(texts[i]) for i in picked]))


def test_batches_keep_to_the_token_budget_and_are_reported(encoder):
    lengths = encoder.tokenize(MANY)["attention_mask"].sum(1)
    calls: list[tuple[int, int, int]] = []
    encoder.encode(MANY, token_budget=60, on_batch=lambda *counts: calls.append(counts))
    assert sum(rows for rows, _, _ in calls) == len(MANY)
    assert sum(tokens for _, tokens, _ in calls) == int(lengths.sum())
    assert all(tokens == padded for _, tokens, padded in calls)
    assert all(tokens <= 60 or rows == 1 for rows, tokens, _ in calls)


def test_the_token_budget_follows_the_device_unless_set():
    encoder = load()
    assert encoder.token_budget == default_token_budget("cpu")
    assert copy.deepcopy(encoder).to("meta").token_budget == default_token_budget("meta") != encoder.token_budget
    assert load(token_budget=77).token_budget == 77


def test_a_batch_size_is_not_used_and_that_is_said(encoder):
    with pytest.warns(UserWarning, match=r"batch_size=1 is not used: .* token_budget=2048"):
        rows = encoder.encode(TEXTS, 1, False, False, True)
    assert torch.equal(rows, encoder.encode(TEXTS))


def test_not_a_tensor_is_an_array(encoder):
    rows = encoder.encode(TEXTS, convert_to_tensor=False)
    assert isinstance(rows, np.ndarray)
    assert isinstance(encoder.encode("one", convert_to_tensor=False, output="tokens").embeddings, np.ndarray)


@pytest.mark.parametrize(
    ("device", "message"),
    [(["cpu", "cpu"], r"\['cpu', 'cpu'\] is a list"), ("gpu", "device='gpu' cannot be used"), ("cuda:99", "cuda:99")],
    ids=str,
)
def test_devices_that_encode_cannot_run_on_are_refused_in_a_sentence(encoder, device, message):
    with pytest.raises(UserError, match=message):
        encoder.encode(TEXTS, device=device)


def test_an_instruction_for_all_texts(encoder):
    assert torch.equal(encoder.encode(TEXTS, instruction=INSTRUCTION), encoder.encode(INPUTS["instr"]))
    assert not torch.allclose(encoder.encode(TEXTS, instruction=INSTRUCTION), encoder.encode(TEXTS))


def test_normalize_and_truncate(encoder):
    rows = encoder.encode(TEXTS)
    torch.testing.assert_close(encoder.encode(TEXTS, normalize=True).norm(dim=1), torch.ones(5))
    assert torch.equal(encoder.encode(TEXTS, truncate_dim=10), rows[:, :10])
    short = encoder.encode(TEXTS, truncate_dim=10, normalize=True)
    torch.testing.assert_close(short, rows[:, :10] / rows[:, :10].norm(dim=1, keepdim=True))
    assert encoder.encode([], truncate_dim=10).shape == (0, 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"truncate_dim": 0}, "truncate_dim=0 is not between 1 and the model's 64 columns"),
        ({"truncate_dim": 65}, "truncate_dim=65"),
        ({"output": "words"}, "output='words' is unknown"),
        ({"non_finite": "drop"}, "non_finite='drop' is unknown"),
        ({"token_budget": -1}, "token_budget=-1"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(encoder, arguments, message):
    with pytest.raises(ValueError, match=message):
        encoder.encode(TEXTS, **arguments)


@pytest.mark.parametrize("settings", [{"pooling_mode": "median"}, {"max_length": 0}, {"doc_max_length": -5}])
def test_settings_that_make_no_sense_are_refused_at_once(settings):
    with pytest.raises(ValueError, match=r"pooling_mode='median' is unknown|is not a positive number of tokens"):
        load(**settings)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("pooling_mode", "cls", "pooling_mode='cls' is unknown: choose"), ("max_length", "12", "max_length='12' is not")],
)
def test_settings_that_are_changed_to_nonsense_are_refused(name, value, message):
    encoder = load()
    setattr(encoder, name, value)
    with pytest.raises(ValueError, match=message):
        encoder.encode(TEXTS)


def test_token_embeddings_average_to_the_embedding(encoder):
    for inputs in INPUTS.values():
        rows = encoder.encode(inputs)
        texts = encoder.encode(inputs, output="tokens")
        torch.testing.assert_close(torch.stack([text.embeddings.mean(0) for text in texts]), rows, rtol=1e-5, atol=1e-5)


def test_token_embeddings_name_their_characters(encoder):
    text = "summit  define"
    tokens = encoder.encode([[INSTRUCTION, text]], output="tokens")[0]
    assert tokens.embeddings.shape == (len(tokens.ids), encoder.dimension)
    pieces = [text[first:last] for first, last in tokens.offsets.tolist()]
    assert "".join(pieces).replace(" ", "") == "summitdefine"
    single = encoder.encode(text, output="tokens", convert_to_numpy=True)
    assert single.offsets[0].tolist() == [0, 0]  # the begin token
    assert isinstance(single.embeddings, np.ndarray)


def test_a_text_without_any_token_is_a_row_of_zeros():
    encoder = load()
    encoder.tokenizer.backend_tokenizer.post_processor = None  # as tokenizers that add no begin token
    calls = []
    rows = encoder.encode(["", "text", ""], on_batch=lambda rows, *_: calls.append(rows))
    assert not rows[[0, 2]].any()
    assert rows[1].any()
    assert sum(calls) == 3
    assert encoder.encode("", output="tokens").embeddings.shape == (0, 64)


def test_forward_takes_packed_ids_and_the_padded_dict(encoder):
    expected = encoder.encode(INPUTS["instr"])
    features = encoder.tokenize(INPUTS["instr"])
    real = features["attention_mask"].bool()
    lengths = real.sum(1)
    with torch.no_grad():
        padded = encoder(features)
        skip = lengths - features["embed_mask"].sum(1)
        packed = encoder(features["input_ids"][real][None], SequenceLayout.from_lengths(lengths), skip)
        batch_of_one = encoder(features["input_ids"][:1, -int(lengths[0]) :])
    assert_same_direction(padded, expected)
    assert_same_direction(packed, expected)
    assert_same_direction(batch_of_one[0], load(skip_instruction=False).encode([INPUTS["instr"][0]])[0])


def test_forward_trains_packed_as_padded():
    """Gradients of every weight agree between the packed and the padded batch, also after encode() accelerated."""
    gradients = []
    for packed in (True, False):
        encoder = load()
        encoder.encode(TEXTS)
        encoder.train()
        features = encoder.tokenize(TEXTS)
        real = features["attention_mask"].bool()
        layout = SequenceLayout.from_lengths(real.sum(1))
        rows = encoder(features["input_ids"][real][None], layout) if packed else encoder(features)
        rows.square().mean().backward()
        gradients.append({name: p.grad for name, p in encoder.named_parameters()})
    assert all(g is not None and bool(g.any()) for g in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-5, msg=name)


def test_encode_after_a_training_step_sees_the_new_weights():
    encoder = load()
    before = encoder.encode(TEXTS)
    encoder.train()
    optimiser = torch.optim.SGD(encoder.parameters(), lr=0.5)
    encoder(encoder.tokenize(TEXTS)).square().mean().backward()
    optimiser.step()
    after = encoder.encode(TEXTS)
    assert encoder.training
    plain = load(accelerate=False)
    plain.load_state_dict(encoder.state_dict())
    assert_same_direction(after, plain.encode(TEXTS))
    assert float(cosine_similarity(before, after).min()) < 0.9999


def test_acceleration_changes_no_result_and_no_key():
    fast, plain = load(dtype="bfloat16"), load(dtype="bfloat16", accelerate=False)
    assert_same_direction(fast.encode(TEXTS), plain.encode(TEXTS), least=0.999)
    assert list(fast.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("merge", [False, True], ids=["separate", "merged"])
def test_adapters_in_bfloat16(merge):
    adapter = FOLDER / "llama-lora"
    exact = LLM2Vec.from_pretrained(FOLDER / "llama", adapter, dtype="float32", device="cpu")
    narrow = LLM2Vec.from_pretrained(FOLDER / "llama", adapter, merge, dtype="bfloat16", device="cpu")
    assert_same_direction(narrow.encode(TEXTS), exact.encode(TEXTS), least=0.999)


def test_gradients_are_on_after_an_encode(encoder):
    encoder.encode(TEXTS[:1])
    assert torch.is_grad_enabled()


def test_moving_to_another_dtype_after_encoding():
    encoder = load()
    rows = encoder.encode(TEXTS)
    assert_same_direction(encoder.to(torch.float64).encode(TEXTS), rows)
    assert encoder.dtype == torch.float64


def test_settings_may_change_between_calls():
    encoder = load()
    encoder.pooling_mode, encoder.max_length = "last_token", 3
    assert torch.equal(encoder.encode(TEXTS), load(pooling_mode="last_token", max_length=3).encode(TEXTS))


def test_copies_work(encoder):
    encoder.encode(TEXTS)
    assert torch.equal(copy.deepcopy(encoder).encode(TEXTS), encoder.encode(TEXTS))


def test_the_constructor_keeps_the_direction_of_the_model():
    """A stock model is causal unless its configuration says otherwise; either way packed texts never mix."""
    for is_causal in (True, False):
        model = AutoModel.from_pretrained(FOLDER / "llama")
        if not is_causal:
            model.config.is_causal = False
        encoder = LLM2Vec(model, AutoTokenizer.from_pretrained(FOLDER / "llama"))
        assert_same_direction(encoder.encode(TEXTS), load(enable_bidirectional=not is_causal).encode(TEXTS))


def poisoned(encoder: LLM2Vec, text: str, value: float) -> LLM2Vec:
    """The encoder with one token of ``text`` embedded as ``value``."""
    token = encoder.tokenize([text])["input_ids"][0, -1]
    with torch.no_grad():
        encoder.model.get_input_embeddings().weight[token] = value
    return encoder


def test_a_non_finite_embedding_is_an_error_that_names_its_place():
    encoder = poisoned(load(), "z", torch.nan)
    with pytest.raises(NonFiniteEmbeddingError, match=r"1 of 3 embeddings hold NaN .* sentences\[1\]"):
        encoder.encode(["one", "z", "two"])


def test_a_non_finite_embedding_can_be_kept_and_touches_no_other():
    encoder = poisoned(load(), "z", torch.inf)
    rows = encoder.encode(["one", "z", "two"], non_finite="keep")
    assert bool(rows[1].isnan().all())
    assert_same_direction(rows[[0, 2]], load().encode(["one", "two"]))
    assert bool(encoder.encode("z", output="tokens", non_finite="keep").embeddings.isnan().any())


def test_a_progress_bar_on_request(encoder, capsys):
    encoder.encode(TEXTS, show_progress_bar=True)
    assert "5/5" in capsys.readouterr().err
    encoder.encode(TEXTS)
    assert capsys.readouterr().err == ""


def test_importing_the_package_is_light():
    script = "import sys, llm2vec_fast; print([n for n in ('torch', 'transformers', 'numpy') if n in sys.modules])"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"


def test_names_the_package_does_not_have():
    import llm2vec_fast

    assert set(llm2vec_fast.__all__) <= set(dir(llm2vec_fast))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = llm2vec_fast.nothing


@pytest.mark.parametrize("texts", [{"a": "text"}, {"one", "two"}], ids=["dict", "set"])
def test_texts_without_an_order_are_refused(encoder, texts):
    with pytest.raises(TypeError, match="not a list of texts: pass them in an order"):
        encoder.encode(texts)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tokenizer": {"input_ids": 1}}, "a dict is no tokenizer of transformers: pass AutoTokenizer"),
        ({"tokenizer": None}, "a NoneType is no tokenizer"),
        ({"model": "gpt2"}, "str is not a transformers model"),
        ({"model": torch.nn.DataParallel}, r"DataParallel is not .*: pass the model that it wraps, its \.module"),
        ({"model": partial(torch.compile, backend="eager")}, r"OptimizedModule .* wraps, its \._orig_mod"),
    ],
    ids=["dict", "none", "name", "parallel", "compiled"],
)
def test_what_is_no_model_and_no_tokenizer_is_named(encoder, changed, message):
    parts = {"model": encoder.model, "tokenizer": encoder.tokenizer, **changed}
    if callable(parts["model"]) and parts["model"] is not encoder.model:
        parts["model"] = parts["model"](encoder.model)
    with pytest.raises(UserError, match=message):
        LLM2Vec(**parts)


def test_a_model_without_values_is_named(encoder, tmp_path):
    empty = copy.deepcopy(encoder).to("meta")
    with pytest.raises(UserError, match="on the meta device, which holds no values"):
        empty.encode(TEXTS)
    with pytest.raises(UserError, match=r"embed_tokens\.weight is on no device"):
        empty.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
