"""Models built from one configuration object do not notice what becomes of each other; a model's parts agree."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import SHAPE, tiny_model
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

from llm2vec_fast.acceleration import accelerate, restore
from llm2vec_fast.bidirectional import UnsupportedModelError, make_bidirectional
from llm2vec_fast.errors import UserError
from llm2vec_fast.kernels.layout import SequenceLayout

IDS = torch.randint(3, SHAPE["vocab_size"], (2, 6), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])


def shared_config() -> LlamaConfig:
    return LlamaConfig(**SHAPE, attn_implementation="eager")


@torch.no_grad()
def states(model: nn.Module) -> Tensor:
    hidden = model(input_ids=IDS, attention_mask=MASK, use_cache=False).last_hidden_state
    return hidden[MASK.bool()]


def alone(model: PreTrainedModel, is_causal: bool = True) -> Tensor:
    """What a stock model with these weights gives, built from a configuration that nobody else has."""
    stock = LlamaModel(LlamaConfig(**SHAPE, attn_implementation="eager", is_causal=is_causal)).eval()
    stock.load_state_dict(model.state_dict())
    return states(stock)


@pytest.mark.parametrize("built", ["before", "after"])
@pytest.mark.parametrize("change", [accelerate, make_bidirectional])
def test_another_model_of_the_same_configuration_stays_as_it_is(change, built: str, tmp_path) -> None:
    config = shared_config()
    said = config.to_dict()
    first = LlamaModel(config).eval()
    if built == "before":
        other = LlamaModel(config).eval()
    change(first)
    if built == "after":
        other = LlamaModel(config).eval()
    assert torch.equal(states(other), alone(other))
    torch.testing.assert_close(states(first), alone(first, is_causal=change is accelerate), atol=1e-4, rtol=0)
    other.save_pretrained(tmp_path)
    assert getattr(AutoConfig.from_pretrained(tmp_path), "is_causal", True)
    change(other)
    torch.testing.assert_close(states(other), alone(other, is_causal=change is accelerate), atol=1e-4, rtol=0)
    restore(other)
    torch.testing.assert_close(states(first), alone(first, is_causal=change is accelerate), atol=1e-4, rtol=0)
    assert {**config.to_dict(), "dtype": None, "architectures": None} == {**said, "dtype": None, "architectures": None}


def test_a_model_built_from_a_changed_ones_configuration_can_be_changed_by_itself() -> None:
    teacher = make_bidirectional(tiny_model("llama"))
    student = LlamaModel(teacher.config).eval()
    with pytest.raises(ValueError, match=r"call make_bidirectional.model., or model.set_attn_implementation"):
        states(student)
    assert "attention" in accelerate(student).swapped
    both_ways = states(teacher)
    make_bidirectional(student, enabled=False)
    torch.testing.assert_close(states(student), alone(student), atol=1e-4, rtol=0)
    assert torch.equal(states(teacher), both_ways)
    assert not teacher.config.is_causal


class Wrapper(nn.Module):
    """As an encoder of somebody's own has it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.config = model, model.config


@pytest.mark.parametrize("frozen", [False, True], ids=["listed", "frozen"])
def test_models_around_the_one_that_was_given_follow_and_others_do_not(frozen: bool, tmp_path) -> None:
    config = shared_config()
    lm, other = LlamaForCausalLM(config), LlamaForCausalLM(config)
    adapted = get_peft_model(lm, LoraConfig(target_modules=["q_proj"]))
    around, towers = Wrapper(adapted), nn.ModuleList([lm.model, other.model])
    towers.config = config
    gc.unfreeze()  # whatever ran in this process before
    if frozen:
        gc.freeze()
    nobodys = nn.Identity()
    nobodys.cycle, left = [nobodys], weakref.ref(nobodys)
    del nobodys
    try:
        make_bidirectional(lm.model)
        assert bool(gc.get_freeze_count()) == frozen
        gc.collect()
        assert left() is None, "garbage was frozen"
    finally:
        gc.unfreeze()
    parts = [m for m in around.modules() if isinstance(vars(m).get("config"), LlamaConfig)]
    assert len(parts) > 5
    assert all(part.config is lm.config for part in parts)
    assert lm.config.is_causal is False
    assert other.config is other.model.config is towers.config is config
    assert getattr(config, "is_causal", True)
    adapted.unload().save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).is_causal is False


class Distiller(LlamaForCausalLM):
    """A student, found by transformers as its decoder, and a teacher beside it."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.teacher = LlamaModel(config)


def test_a_teacher_inside_the_students_model_stays_as_it_is() -> None:
    model = Distiller(shared_config()).eval()
    make_bidirectional(model)
    assert torch.equal(states(model.teacher), alone(model.teacher))
    assert model.config is model.model.config is not model.teacher.config


def llava(config: LlavaConfig) -> LlavaForConditionalGeneration:
    return LlavaForConditionalGeneration(config).eval()


@pytest.mark.parametrize("given", ["whole", "decoder"])
def test_a_multimodal_models_parts_agree(given: str, tmp_path) -> None:
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = LlavaConfig(text_config=shared_config(), vision_config=vision, image_token_id=96)
    model, other = llava(config), llava(config)
    make_bidirectional(model if given == "whole" else model.get_decoder())
    text = model.get_decoder().config
    assert model.config is model.model.config
    assert model.config.text_config is text
    assert model.config.vision_config is model.model.vision_tower.config
    assert other.config is config
    assert getattr(other.get_decoder().config, "is_causal", True)
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).text_config.is_causal is False


def test_a_refused_model_keeps_its_configuration_object() -> None:
    model = tiny_model("nemotron")
    config = model.config
    with pytest.raises(UnsupportedModelError):
        make_bidirectional(model)
    assert all(vars(m)["config"] is config for m in model.modules() if "config" in vars(m))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_clones_can_be_changed_by_themselves(clone) -> None:
    model = make_bidirectional(tiny_model("llama"))
    both_ways, twin = states(model), clone(model)
    make_bidirectional(twin, enabled=False)
    assert torch.equal(states(model), both_ways)
    torch.testing.assert_close(states(twin), alone(twin), atol=1e-4, rtol=0)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("enabled", [True, False], ids=["bidirectional", "causal"])
def test_another_attention_set_afterwards_runs_as_in_a_stock_model(attention: str, enabled: bool) -> None:
    """Padding is seen, and packed texts are refused: that attention would mix them."""
    model = make_bidirectional(tiny_model("llama"), enabled=enabled)
    model.set_attn_implementation(attention)
    torch.testing.assert_close(states(model), alone(model, is_causal=not enabled), atol=1e-4, rtol=0)
    packed, places = IDS.view(1, -1), torch.arange(6).repeat(2)[None]
    refused = pytest.raises(UserError, match=f"LlamaModel no longer runs this library's attention but '{attention}'")
    with refused:
        model(input_ids=IDS, layout=SequenceLayout.from_shape(2, 6))
    if enabled:
        with refused:
            model(input_ids=packed, position_ids=places)
    else:  # stock transformers keeps them apart
        found = model(input_ids=packed, position_ids=places, use_cache=False).last_hidden_state
        torch.testing.assert_close(found.view(2, 6, -1), model(input_ids=IDS).last_hidden_state, atol=1e-4, rtol=0)
    make_bidirectional(model, enabled=enabled)
    torch.testing.assert_close(states(model), alone(model, is_causal=not enabled), atol=1e-4, rtol=0)


def test_a_model_from_a_saved_changed_one_is_like_it(tmp_path) -> None:
    model = make_bidirectional(tiny_model("llama"))
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(states(again), states(model), atol=1e-4, rtol=0)
