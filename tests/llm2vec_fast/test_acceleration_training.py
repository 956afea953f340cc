"""An accelerated causal language model trains as the stock one does, and comes back as it was."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from numerics import GRADIENT_FACTOR, assert_error_within
from peft import LoraConfig, get_peft_model
from tiny_models import FAMILIES, SHAPE, tiny_model
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.functional import cross_entropy
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from llm2vec_fast.acceleration import accelerate, restore
from llm2vec_fast.bidirectional import ATTENTION_NAME, make_bidirectional

LENGTHS = (19, 16, 17)  # no padding that sees padding alone through a window: stock models give NaN there in float64
PARTS = ("attention", "norm", "rotary", "swiglu", "loss")


def batch(seed: int = 1) -> dict[str, Tensor]:
    """Three texts, padded on the right, the loss on about half of the tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, SHAPE["vocab_size"], (len(LENGTHS), max(LENGTHS)), generator=generator)
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    wanted = (torch.rand(ids.shape, generator=generator) < 0.5) & mask.bool()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.where(wanted, -100)}


def causal_model(family: str = "llama", **changes: object) -> PreTrainedModel:
    settings = {**SHAPE, **FAMILIES[family], **changes}
    # Wilder weights make a gradient so chaotic that in bfloat16 it is noise, whoever computes it.
    config = CONFIG_MAPPING[settings.pop("model_type")](**{**settings, "initializer_range": 0.15})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(mean=1.0, std=0.2)
    return model


def losses_and_gradients(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """The losses of some batches, and the gradients of the last by name; a parameter that takes no part has none."""
    losses = []
    for seed in range(4):
        model.zero_grad()
        losses.append(model(**batch(seed)).loss)
    losses[-1].backward()
    return torch.stack(losses).detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def next_token_loss(logits: Tensor, labels: Tensor, *_: object, **__: object) -> Tensor:
    """The definition of a causal language model's loss."""
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def assert_trains_like(model: nn.Module, stock: nn.Module) -> None:
    """Loss and every gradient keep the rule, ``stock`` being the same model before it was accelerated."""
    wide = copy.deepcopy(stock).double()
    head = wide.get_base_model() if hasattr(wide, "get_base_model") else wide
    head.loss_function = next_token_loss  # the stock one computes in float32
    exact_loss, exact = losses_and_gradients(wide)
    plain_loss, plain = losses_and_gradients(stock)
    loss, gradients = losses_and_gradients(model)
    assert_error_within(loss, plain_loss, exact_loss, name="loss")
    assert gradients.keys() == exact.keys()
    # One parameter at a time a lucky stock gradient would be a wrong yardstick: all of them, each at its own scale.
    scales = {name: float(gradient.square().mean().sqrt()) for name, gradient in exact.items()}
    joined = [torch.cat([(g[name] / scales[name]).flatten() for name in exact]) for g in (gradients, plain, exact)]
    assert_error_within(*joined, factor=GRADIENT_FACTOR, name="gradients")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_as_exact_as_the_stock_models(family: str, dtype: torch.dtype) -> None:
    stock = causal_model(family).to(dtype).train()
    model = copy.deepcopy(stock)
    report = accelerate(model)
    assert report.swapped.keys() >= set(PARTS)
    assert report.swapped["swiglu"] == report.swapped["rotary"] == SHAPE["num_hidden_layers"]
    assert_trains_like(model, stock)


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3"])
def test_a_bidirectional_encoder_trains_as_before(family: str) -> None:
    results = {}
    for kind in ("exact", "plain", "ours"):
        model = make_bidirectional(tiny_model(family)).train()
        if kind == "exact":
            model.double()
        elif kind == "ours":
            assert "already" in accelerate(model).left["attention"]
        hidden = model(input_ids=batch()["input_ids"], attention_mask=batch()["attention_mask"]).last_hidden_state
        pooled = hidden[batch()["attention_mask"].bool()]
        seed = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(5)).to(pooled.dtype)
        gradients = torch.autograd.grad(pooled, list(model.parameters()), seed)
        results[kind] = pooled, torch.cat([g.flatten() for g in gradients])
    assert_error_within(results["ours"][0], results["plain"][0], results["exact"][0])
    assert_error_within(results["ours"][1], results["plain"][1], results["exact"][1], factor=GRADIENT_FACTOR)


def with_adapter(model: nn.Module) -> nn.Module:
    torch.manual_seed(3)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("adapter_first", [True, False], ids=["adapter-then-accelerate", "accelerate-then-adapter"])
def test_adapters_train_alike_put_on_before_or_after(adapter_first: bool, family: str) -> None:
    stock, model = with_adapter(causal_model(family)).train(), causal_model(family)
    model = with_adapter(model) if adapter_first else model
    report = accelerate(model)
    assert report.swapped.keys() >= set(PARTS)
    assert_trains_like((model if adapter_first else with_adapter(model)).train(), stock)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(reentrant: bool) -> None:
    stock = causal_model().train()
    model = copy.deepcopy(stock)
    accelerate(model)
    if reentrant:
        model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_trains_like(model, stock)


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3"])
def test_it_compiles_whole_and_only_once_as_lengths_change(family: str) -> None:
    torch._dynamo.reset()
    counters.clear()
    few = {"num_hidden_layers": 1} | ({"layer_types": ["sliding_attention"]} if family == "gemma3" else {})
    model = causal_model(family, **few).train()
    accelerate(model, attention=False, loss=False)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows, length in ((3, 19), (5, 7), (6, 40)):
        ids = torch.randint(3, SHAPE["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(length))
        expected = model(input_ids=ids, use_cache=False).logits
        logits = compiled(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(logits, expected)
        logits.square().mean().backward()
    assert counters["stats"]["unique_graphs"] == 1


def test_everything_swapped_compiles_and_trains() -> None:
    torch._dynamo.reset()
    model = causal_model(num_hidden_layers=1).train()
    accelerate(model)
    compiled = torch.compile(model, backend="aot_eager")
    plain, ours = model(**batch()).loss, compiled(**batch()).loss
    torch.testing.assert_close(ours, plain)
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = [torch.autograd.grad(loss, parameters) for loss in (ours, plain)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_accelerated_and_can_be_restored(clone: Callable[[nn.Module], nn.Module]) -> None:
    model = causal_model("gemma3").train()
    stock = model(**batch()).loss
    accelerate(model)
    twin = clone(model)
    expected, gradients = losses_and_gradients(model)
    loss, same = losses_and_gradients(twin)
    assert torch.equal(loss, expected)
    assert all(torch.equal(gradients[name], same[name]) for name in gradients)
    restore(twin)
    assert torch.equal(twin(**batch()).loss, stock)
    assert torch.equal(model(**batch(1)).loss, expected[1])


def test_what_is_saved_is_the_stock_model(tmp_path: Path) -> None:
    stock, model = causal_model("phi3"), causal_model("phi3")
    accelerate(model)
    assert list(model.state_dict()) == list(stock.state_dict())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert type(loaded) is type(stock)
    assert torch.equal(loaded(**batch()).logits, stock.eval()(**batch()).logits)


def state_of(model: nn.Module) -> dict:
    """What `restore` must bring back: classes, attributes, hooks, configuration."""
    return {
        name: (type(m), sorted(m.__dict__), list(m._forward_pre_hooks), list(m._forward_pre_hooks_with_kwargs))
        for name, m in model.named_modules()
    } | {"configuration": model.config.to_dict(), "attention": model.config._attn_implementation}


@pytest.mark.parametrize("is_causal", [None, False])
def test_restore_leaves_no_trace(is_causal: bool | None) -> None:
    model = causal_model("gemma2").train()
    if is_causal is not None:
        model.config.is_causal = is_causal
    before, stock = state_of(model), model(**batch())
    accelerate(model)
    accelerate(model)
    assert model.config._attn_implementation == ATTENTION_NAME
    model(**batch()).loss.backward()
    restore(model)
    assert state_of(model) == before
    again = model(**batch())
    assert torch.equal(again.logits, stock.logits)
    assert torch.equal(again.loss, stock.loss)


@pytest.mark.parametrize("part", PARTS)
def test_each_part_can_be_left_out(part: str) -> None:
    report = accelerate(causal_model(), **{part: False})
    assert report.swapped.keys() == set(PARTS) - {part}


def test_no_logits_unless_asked_for() -> None:
    model = causal_model("gemma2", final_logit_softcapping=5.0).train()
    stock = model(**batch())
    accelerate(model)
    assert model(**batch()).logits is None
    asked = model(**batch(), output_logits=True)
    for ours in (asked.loss, model(**batch()).loss, model(**batch(), return_dict=False)[0]):
        torch.testing.assert_close(ours, stock.loss)
    torch.testing.assert_close(
        asked.logits[batch()["attention_mask"].bool()], stock.logits[batch()["attention_mask"].bool()]
    )
    unlabelled = {name: x for name, x in batch().items() if name != "labels"}
    assert model(**unlabelled).logits.shape == stock.logits.shape


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("plain", [True, False], ids=["plain-head", "hooked-head"])
def test_scores_are_those_of_the_logits(plain: bool, family: str) -> None:
    """Whatever the loss is divided by."""
    model = causal_model(family).train()
    logits, labels = model(**batch()).logits[:, :-1], batch()["labels"][:, 1:]
    labels[:, ::2] = logits[:, ::2].argmax(-1).where(labels[:, ::2] >= 0, -100)  # some of them right
    given = {**batch(), "labels": torch.nn.functional.pad(labels, (1, 0), value=-100)}
    wanted = labels >= 0
    correct = (logits.argmax(-1) == labels) & wanted
    log_probs = logits.float().log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0] * wanted
    accelerate(model)
    if not plain:
        model.lm_head.register_forward_hook(lambda module, inputs, output: output)
    outputs = model(**given, output_scores=True, num_items_in_batch=7)
    assert 0.2 < outputs.accuracy < 1
    torch.testing.assert_close(outputs.accuracy, correct.sum() / wanted.sum())
    torch.testing.assert_close(outputs.log_probs[:, :-1], log_probs)
    torch.testing.assert_close(outputs.loss, -log_probs.sum() / 7)
    assert torch.equal(outputs.correct[:, :-1], correct)
    assert not (outputs.correct[:, -1].any())
    assert not (outputs.log_probs[:, -1].any())
    assert not outputs.log_probs.requires_grad
    assert (outputs.logits is None) == plain


@pytest.mark.parametrize(
    "keywords",
    [
        {"num_items_in_batch": 7},
        {"num_items_in_batch": torch.tensor(7)},
        {"ignore_index": 5},
        {"shift_labels": batch()["labels"]},
    ],
    ids=["items", "items-tensor", "ignore", "shifted"],
)
def test_keywords_of_the_stock_loss_mean_the_same(keywords: dict) -> None:
    model = causal_model().train()
    given = batch()
    if "ignore_index" in keywords:
        given["labels"] = given["labels"].where(given["labels"] >= 0, 5)
    stock = model(**given, **keywords).loss
    assert "loss" in accelerate(model).swapped
    torch.testing.assert_close(model(**given, **keywords).loss, stock)


def test_a_loss_or_a_head_of_ones_own_still_counts() -> None:
    model = causal_model().train()
    accelerate(model)
    model.loss_function = lambda logits, labels, **_: logits.sum() * 0 + 42
    assert model(**batch()).loss == 42
    del model._loss_function
    expected = model(**batch()).loss
    model.lm_head.register_forward_hook(lambda module, inputs, output: output * 0)
    assert model(**batch()).loss > expected.new_tensor(SHAPE["vocab_size"]).log() - 1e-3


def test_an_output_layer_that_is_not_plain_is_said_not_hidden(caplog: pytest.LogCaptureFixture) -> None:
    config = LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    before, after = causal_model().train(), causal_model().train()
    get_peft_model(before, config)
    assert "peft.tuners.lora.layer.Linear" in accelerate(before).left["loss"]
    assert "loss" in accelerate(after).swapped
    get_peft_model(after, config)
    with caplog.at_level("WARNING", "llm2vec_fast"):
        losses = [after(**batch()).loss for _ in range(2)]
    assert losses[0] == losses[1]
    assert [record.message for record in caplog.records if "from all logits" in record.message] == [
        "LlamaForCausalLM has an output layer that is not a torch Linear but peft.tuners.lora.layer.Linear: "
        "its loss is computed from all logits"
    ]


def test_a_head_that_scales_its_logits_is_left_alone_with_a_reason() -> None:
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["cohere"](**SHAPE))
    assert "a way of its own" in accelerate(model).left["loss"]


def test_a_bare_decoder_has_no_loss_to_swap() -> None:
    assert "no language modelling head" in accelerate(tiny_model("llama")).left["loss"]


def test_trainers_still_see_what_the_model_takes() -> None:
    model = causal_model()
    before = inspect.signature(model.forward)
    accelerate(model)
    assert inspect.signature(model.forward) == before


@torch.no_grad()
def test_a_cache_is_used_and_returned_beside_a_loss() -> None:
    model = causal_model().eval()
    ids = batch()["input_ids"][:1]
    prefix = model(input_ids=ids[:, :6], use_cache=True)
    name = next(name for name in ("cache", "past_key_values") if name in prefix)  # by transformers' release
    expected = copy.deepcopy(model)(input_ids=ids[:, 6:], labels=ids[:, 6:], **{name: copy.deepcopy(prefix[name])})
    accelerate(model, attention=False)
    outputs = model(input_ids=ids[:, 6:], labels=ids[:, 6:], **{name: prefix[name]}, use_cache=True)
    assert outputs[name].get_seq_length() == ids.shape[1]
    torch.testing.assert_close(outputs.loss, expected.loss)


def test_generation_works_with_the_stock_attention() -> None:
    model = causal_model().eval()
    ids = batch()["input_ids"][:1, :5]
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)
    accelerate(model, attention=False)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), expected)
    restore(model)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), expected)


def test_class_globals_are_untouched() -> None:
    accelerate(causal_model())
    other = causal_model().train()
    assert other(**batch()).logits is not None
    assert not any("_stock_class" in m.__dict__ for m in other.modules())
