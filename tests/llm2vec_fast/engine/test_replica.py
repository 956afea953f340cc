"""Encoding neither asks in which mode a model is nor leaves anything behind in it, and sees every change of it."""

from __future__ import annotations

import copy
import gc
import pickle
import types
import weakref
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from reference_data import FOLDER, TEXTS
from torch import nn
from torch.nn.functional import cosine_similarity
from transformers import AutoModel, AutoTokenizer

from llm2vec_fast import LLM2Vec, accelerate
from llm2vec_fast.acceleration import restore
from llm2vec_fast.errors import UserError

LORA = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", "init_lora_weights": False}


def own_model(*, training: bool, dtype: torch.dtype = torch.float32, lora: dict | None = None) -> nn.Module:
    """What a user has: a stock model with dropout, perhaps with an adapter, in a mode of its own."""
    model = AutoModel.from_pretrained(FOLDER / "llama", attention_dropout=0.5, dtype=dtype)
    if lora is not None:
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(**LORA, **lora))
    return model.train(training)


def encoder_of(model: nn.Module, **settings: object) -> LLM2Vec:
    return LLM2Vec(model, AutoTokenizer.from_pretrained(FOLDER / "llama"), **settings)


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(cosine_similarity(a.double(), b.double(), dim=-1).min())


def state(model: nn.Module) -> list[tuple]:
    """Class, mode and attributes of every module."""
    return [(type(m), m.training, {name: id(x) for name, x in vars(m).items()}) for m in model.modules()]


def test_an_encode_is_without_dropout_and_leaves_a_model_in_training_as_it_was():
    model = own_model(training=True, lora={"lora_dropout": 0.5})
    encoder = encoder_of(model)
    next(iter(model.modules())).training = False  # a mode of its own, as frozen batch norms have
    before, random = state(model), torch.random.get_rng_state()
    rows = encoder.encode(TEXTS)
    assert state(model) == before
    assert torch.equal(torch.random.get_rng_state(), random)
    still = encoder_of(own_model(training=False, lora={"lora_dropout": 0.5}))
    assert torch.equal(rows, still.encode(TEXTS))
    assert torch.equal(rows, encoder.encode(TEXTS))


@pytest.mark.parametrize("training", [True, False])
def test_an_encoder_is_in_the_mode_of_its_model(training: bool):
    encoder = encoder_of(own_model(training=training))
    encoder.encode(TEXTS)
    assert encoder.training == encoder.model.training == training


def test_what_encode_runs_is_made_once():
    encoder = encoder_of(own_model(training=True, dtype=torch.bfloat16))
    encoder.encode(TEXTS)
    replica = encoder._replica
    encoder.encode(TEXTS)
    encoder.eval()
    encoder.model.train()
    encoder.encode(TEXTS)
    assert encoder._replica is replica


def test_autocast_around_a_call_does_not_reach_in():
    encoder = encoder_of(own_model(training=False))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rows = encoder.encode(TEXTS)
    assert torch.equal(rows, encoder.encode(TEXTS))


def disabled(model: nn.Module) -> None:
    model.base_model.disable_adapter_layers()


def merged(model: nn.Module) -> None:
    model.merge_adapter()


def unmerged(model: nn.Module) -> None:
    model.merge_adapter()
    encoder_of(model).encode(TEXTS)
    model.unmerge_adapter()


def another_adapter(model: nn.Module) -> None:
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.set_adapter("other")


def resized(model: nn.Module) -> None:
    model.get_base_model().resize_token_embeddings(400, mean_resizing=False)


def loaded(model: nn.Module) -> None:
    model.load_state_dict({name: x.flip(0) for name, x in model.state_dict().items()}, assign=True)


def trained(model: nn.Module) -> None:
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    optimiser.step()


def cast(model: nn.Module) -> None:
    model.half()


@pytest.mark.parametrize("change", [disabled, merged, unmerged, another_adapter, resized, loaded, trained, cast])
def test_changes_of_the_model_are_seen(change: Callable[[nn.Module], None]):
    encoder = encoder_of(own_model(training=False, dtype=torch.bfloat16, lora={}))
    encoder.encode(TEXTS)
    change(encoder.model)
    fresh = encoder_of(encoder.model)
    assert torch.equal(encoder.encode(TEXTS), fresh.encode(TEXTS))
    assert cosine(encoder.encode(TEXTS), encoder_of(encoder.model, accelerate=False).encode(TEXTS)) > 0.999


def test_a_model_put_in_the_place_of_another_is_seen():
    encoder = encoder_of(own_model(training=False, lora={}))
    rows = encoder.encode(TEXTS)
    encoder.model = encoder.model.merge_and_unload()
    assert cosine(encoder.encode(TEXTS), rows) > 0.99999
    encoder.accelerate = False
    assert cosine(encoder.encode(TEXTS), rows) > 0.99999


def test_methods_on_the_instance_run_in_evaluation_mode():
    """As accelerate's device maps and other speed-ups put them there."""
    model, calls = own_model(training=True), []
    layer = model.layers[0]

    def forward(self: nn.Module, *args: object, **kwargs: object) -> torch.Tensor:
        calls.append((self is layer, self.training))
        return type(self).forward(self, *args, **kwargs)

    layer.forward = types.MethodType(forward, layer)
    encoder = encoder_of(model)
    calls.clear()
    rows = encoder.encode(TEXTS)
    assert calls == [(False, False)]
    assert cosine(rows, encoder_of(own_model(training=False)).encode(TEXTS)) > 0.99999


def test_a_function_that_holds_a_module_in_training_is_refused():
    """It would compute with dropout: nothing outside can tell it not to."""
    model = own_model(training=True)
    plain = model.layers[0].forward
    model.layers[0].forward = lambda *args, **kwargs: plain(*args, **kwargs)
    encoder = encoder_of(model)
    with pytest.raises(UserError, match=r"LlamaDecoderLayer has a forward method of its own .* call model.eval\(\)"):
        encoder.encode(TEXTS)
    encoder.eval()
    assert cosine(encoder.encode(TEXTS), encoder_of(own_model(training=False)).encode(TEXTS)) > 0.99999


def test_weights_on_disk_are_loaded_for_each_layer(tmp_path):
    from accelerate import disk_offload

    model = own_model(training=True)
    expected = encoder_of(own_model(training=False)).encode(TEXTS)
    disk_offload(model, str(tmp_path))
    encoder = encoder_of(model)
    assert cosine(encoder.encode(TEXTS), expected) > 0.99999
    assert all(weight.is_meta for weight in model.parameters())


def test_attention_taken_away_is_an_error_and_no_mixture_of_texts():
    model = own_model(training=False)
    accelerate(model)
    encoder = encoder_of(model)
    encoder.encode(TEXTS)
    restore(model)
    with pytest.raises(UserError, match=r"no longer runs this library's attention but 'sdpa'"):
        encoder.encode(TEXTS)


def test_copies_and_pickles_make_their_own():
    encoder = encoder_of(own_model(training=False, dtype=torch.bfloat16))
    rows = encoder.encode(TEXTS)
    for clone in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        assert clone._replica is None
        assert torch.equal(clone.encode(TEXTS), rows)
    assert list(clone.state_dict()) == list(encoder.state_dict())


def test_an_encoder_that_is_gone_leaves_nothing():
    encoder = encoder_of(own_model(training=False, dtype=torch.bfloat16))
    encoder.encode(TEXTS)
    left = [weakref.ref(encoder._replica.model), weakref.ref(encoder.model.layers[0])]
    del encoder
    gc.collect()
    assert [reference() for reference in left] == [None, None]
