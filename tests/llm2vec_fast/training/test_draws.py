"""What is dropped follows from the seed alone: a pass that runs twice, first without a graph, gives the right gradient.

The oracle is the loss itself: its slope along the gradient, by central differences under one seed. Another mask in one
of the two passes makes it miss by tens of per cent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import SHAPE, tiny_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llm2vec_fast.acceleration import accelerate
from llm2vec_fast.bidirectional import make_bidirectional
from llm2vec_fast.kernels import contrastive_loss
from llm2vec_fast.kernels.layout import SequenceLayout
from llm2vec_fast.training import GradCache
from llm2vec_fast.training.embedding import embedding_model

IDS = [torch.randint(3, SHAPE["vocab_size"], (6, 9), generator=torch.Generator().manual_seed(i)) for i in (1, 2)]
EPSILON = 1e-3  # of float32 weights of about 0.1: curvature and rounding leave the slope right to four digits


def adapted(
    family: str = "llama", lora: float = 0.2, attention: float = 0.3, accelerated: bool = True, **changes: object
) -> nn.Module:
    """A decoder that attends both ways under an adapter of random weights, in training mode."""
    model = make_bidirectional(tiny_model(family, **{"num_hidden_layers": 2, **changes}))
    torch.manual_seed(3)
    config = LoraConfig(r=4, lora_dropout=lora, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(model, config)
    if accelerated:
        accelerate(model)
    for layer in model.modules():
        if hasattr(layer, "attention_dropout"):
            layer.attention_dropout = attention
    return model.train()


def embed(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).last_hidden_state.mean(1)


def loss_of(queries: Tensor, documents: Tensor) -> Tensor:
    return contrastive_loss(queries, documents, scale=5.0)


def whole(model: nn.Module) -> Tensor:
    """With its whole graph, chunk after chunk as the cache draws."""
    rows = [torch.cat([embed(model, chunk) for chunk in ids.split(3)]) for ids in IDS]
    return loss_of(*rows)


def cached(model: nn.Module) -> Tensor:
    return GradCache(lambda ids: embed(model, ids), loss_of, 3, model=model).loss(*IDS)


def checkpointed(reentrant: bool) -> Callable[[nn.Module], Tensor]:
    def run(model: nn.Module) -> Tensor:
        if not model.is_gradient_checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        return whole(model)

    return run


KINDS = {"cached": cached, "reentrant": checkpointed(True), "non-reentrant": checkpointed(False)}


def gradients(loss: Callable[[nn.Module], Tensor], model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and gradients of one step under one seed."""
    model.zero_grad()
    torch.manual_seed(11)
    value = loss(model)
    value.backward()
    return value.detach(), {name: x.grad for name, x in model.named_parameters() if x.grad is not None}


@contextmanager
def moved(model: nn.Module, direction: dict[str, Tensor], distance: float) -> Iterator[None]:
    parameters = dict(model.named_parameters())
    before = {name: parameters[name].detach().clone() for name in direction}
    with torch.no_grad():
        for name, x in direction.items():
            parameters[name].add_(x, alpha=distance)
    yield
    with torch.no_grad():
        for name, x in before.items():
            parameters[name].copy_(x)


def assert_gradient_is_the_slope(
    loss: Callable[[nn.Module], Tensor], model: nn.Module, found: dict[str, Tensor]
) -> None:
    length = sum(x.square().sum() for x in found.values()).sqrt()
    ends = []
    for sign in (1, -1):
        with moved(model, {name: x / length for name, x in found.items()}, sign * EPSILON), torch.no_grad():
            torch.manual_seed(11)
            ends.append(float(loss(model)))
    assert (ends[0] - ends[1]) / (2 * EPSILON) == pytest.approx(float(length), rel=0.01)


@pytest.mark.parametrize(
    ("accelerated", "lora", "attention"), [(True, 0.0, 0.0), (True, 0.05, 0.0), (True, 0.2, 0.3), (False, 0.2, 0.3)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_for_the_gradient_drops_what_the_first_dropped(
    kind: str, accelerated: bool, lora: float, attention: float
) -> None:
    model = adapted(lora=lora, attention=attention, accelerated=accelerated)
    expected_loss, expected = gradients(whole, model)
    loss, found = gradients(KINDS[kind], model)
    torch.testing.assert_close(loss, expected_loss)
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, rtol=1e-4, atol=1e-5)
    assert_gradient_is_the_slope(KINDS[kind], model, found)


@pytest.mark.parametrize("kind", ["cached", "reentrant"])
def test_under_autocast_too(kind: str) -> None:
    """The loss is backpropagated outside of autocast, as it should be."""

    def under_autocast(loss: Callable[[nn.Module], Tensor]) -> Callable[[nn.Module], Tensor]:
        def run(model: nn.Module) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return loss(model)

        return run

    model = adapted()
    expected_loss, expected = gradients(under_autocast(whole), model)
    loss, found = gradients(under_autocast(KINDS[kind]), model)
    assert found.keys() == expected.keys()
    rounding = 4 * torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(loss, expected_loss, rtol=rounding, atol=0)
    for name, x in expected.items():
        assert float((found[name] - x).norm()) <= rounding * float(x.norm()), name


def test_compiled_too() -> None:
    torch._dynamo.reset()
    model = adapted(num_hidden_layers=1)
    compiled = torch.compile(model, backend="aot_eager")
    loss, found = gradients(lambda model: cached(compiled), model)
    expected_loss, expected = gradients(lambda model: whole(compiled), model)
    torch.testing.assert_close(loss, expected_loss)
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "changes"),
    [("gpt2", {"n_embd": 32, "n_head": 4, "n_layer": 2, "attn_pdrop": 0.2}), ("opt", {"dropout": 0.2})],
    ids=["gpt2", "opt"],
)
def test_dropout_of_hidden_states_and_noise_on_embeddings_too(family: str, changes: dict[str, object]) -> None:
    model = adapted(family, **changes)
    assert any(isinstance(x, nn.Dropout) and x.p for x in model.modules()) or model.config.dropout
    arguments = SimpleNamespace(p=5.0)

    def noise(module: nn.Module, inputs: object, out: Tensor) -> Tensor:  # as transformers' NEFTune draws it
        return out + torch.zeros_like(out).uniform_(-1, 1) * arguments.p / out[0].numel() ** 0.5

    model.get_base_model().get_input_embeddings().register_forward_hook(noise)
    expected_loss, expected = gradients(whole, model)
    loss, found = gradients(cached, model)
    torch.testing.assert_close(loss, expected_loss)
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, rtol=1e-4, atol=1e-5)
    arguments.p = 0.0
    assert float(gradients(whole, model)[0]) != float(expected_loss)


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["", "non-reentrant", "reentrant"])
def test_a_stage_that_embeds_in_pieces_has_the_gradient_of_what_it_drops(
    reentrant: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With activation checkpointing inside of each piece, or without."""
    model = adapted()
    embedding_model(model, "mean", token_budget=20)
    layout = SequenceLayout.from_lengths([9, 12, 3, 7, 8, 6])
    ids = torch.randint(3, SHAPE["vocab_size"], (1, layout.total), generator=torch.Generator().manual_seed(5))
    batch = {"input_ids": ids, "layout": layout, "position_ids": layout.position_ids[None], "embed": True}

    def loss(model: nn.Module) -> Tensor:
        return loss_of(*model(**batch).rows.split(3))

    with monkeypatch.context() as patch:  # each piece once, its graph kept
        patch.setattr("llm2vec_fast.training.embedding.checkpoint", lambda f, *x, use_reentrant: f(*x))
        expected_loss, expected = gradients(loss, model)
    if reentrant is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    value, found = gradients(loss, model)
    torch.testing.assert_close(value, expected_loss)
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, rtol=1e-4, atol=1e-5)
    assert_gradient_is_the_slope(loss, model, found)


def test_dropout_has_the_mode_of_its_own_module() -> None:
    """As somebody sets who wants dropout in evaluation mode, or none in training mode."""
    ids = IDS[0]
    for accelerated in (False, True):
        model = adapted(attention=0.0, accelerated=accelerated)
        drops = [x for x in model.modules() if isinstance(x, nn.Dropout)]
        plain = embed(model.eval(), ids)
        for x in drops:
            x.train()
        assert not torch.allclose(embed(model, ids), plain)
        model.train()
        for x in drops:
            x.eval()
        torch.testing.assert_close(embed(model, ids), plain)


def test_a_checkpointed_lora_layer_alone() -> None:
    """Nothing else around: a float32 adapter on a 16-bit layer, whose two passes share a dtype, too."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 24)).to(torch.bfloat16)
    config = LoraConfig(r=4, lora_dropout=0.2, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(net, config).train()
    accelerate(model)
    x = torch.randn(8, 16).to(torch.bfloat16).requires_grad_()
    passes: list[tuple[bool, Tensor]] = []

    def run(x: Tensor) -> Tensor:
        out = model(x)
        passes.append((torch.is_grad_enabled(), out.detach().clone()))
        return out

    checkpoint(run, x, use_reentrant=True).sum().backward()
    assert [graph for graph, _ in passes] == [False, True]
    assert torch.equal(passes[0][1], passes[1][1])


def test_reentrant_checkpointing_that_loses_the_graph_is_named() -> None:
    """Embeddings are frozen under an adapter: without a hook no input of the checkpointed layers has a gradient."""
    model = adapted()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.get_base_model().disable_input_require_grads()
    with pytest.raises(ValueError, match="call its enable_input_require_grads"):
        gradients(cached, model)
