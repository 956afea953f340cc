"""NEFTune's noise on a packed batch: each sequence's as if it were alone, and the same again in a replay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor
from transformers.integrations.neftune import neftune_post_forward_hook

from llm2vec_fast import make_bidirectional
from llm2vec_fast.kernels.layout import SequenceLayout
from llm2vec_fast.training import MntpArguments, train_mntp
from llm2vec_fast.training.embedding import embedding_model
from llm2vec_fast.training.neftune import add_noise

ALPHA, LENGTHS = 5.0, (3, 40, 1, 17)


@pytest.fixture
def model() -> torch.nn.Module:
    model = make_bidirectional(tiny_model("llama")).train()
    add_noise(model, ALPHA)
    return model


@pytest.fixture
def noise(model: torch.nn.Module) -> list[Tensor]:
    """What was added to the embedded tokens in each forward pass (T, d)."""
    found: list[Tensor] = []
    embedding = model.get_input_embeddings()

    def kept(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        clean = torch.nn.functional.embedding(embedded[-1], embedding.weight)
        found.append((args[0] - clean)[0].detach())

    embedded: list[Tensor] = []
    embedding.register_forward_pre_hook(lambda module, args: embedded.append(args[0]))
    model.layers[0].register_forward_pre_hook(kept, with_kwargs=True)
    return found


def packed(*lengths: int) -> dict[str, Tensor]:
    layout = SequenceLayout.from_lengths(lengths)
    ids = torch.randint(3, 97, (1, layout.total), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "position_ids": layout.position_ids.view(1, -1)}


def test_each_sequence_has_the_noise_that_it_has_alone(model: torch.nn.Module, noise: list[Tensor]) -> None:
    """The largest of so many uniform draws is close to their bound, alpha / √(L · d)."""
    for _ in range(50):
        model(**packed(*LENGTHS))
    largest = [part.abs().max().item() for part in torch.stack(noise).split(LENGTHS, dim=1)]
    bounds = [ALPHA / (length * 32) ** 0.5 for length in LENGTHS]
    assert all(0.97 * bound < most <= bound * (1 + 1e-5) for most, bound in zip(largest, bounds, strict=True))


@pytest.mark.parametrize("length", [1, 7, 64])
def test_a_sequence_alone_has_transformers_noise(length: int, model: torch.nn.Module, noise: list[Tensor]) -> None:
    batch = packed(length)
    torch.manual_seed(3)
    model(**batch)
    stock = torch.nn.Embedding(97, 32).train()
    stock.weight, stock.neftune_noise_alpha = model.get_input_embeddings().weight, ALPHA
    torch.manual_seed(3)
    clean = stock(batch["input_ids"])
    expected = neftune_post_forward_hook(stock, (), clean) - clean
    torch.testing.assert_close(noise[0], expected[0].detach())


def test_a_padded_batch_and_evaluation(model: torch.nn.Module, noise: list[Tensor]) -> None:
    ids = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    model(input_ids=ids, attention_mask=mask)
    assert noise[0].abs().max() <= ALPHA / (9 * 32) ** 0.5 * (1 + 1e-5)
    model.eval()(**packed(*LENGTHS))
    assert not noise[1].any()


@pytest.mark.parametrize("checkpointed", [False, True])
def test_what_is_computed_once_more_has_the_same_noise(
    checkpointed: bool, model: torch.nn.Module, noise: list[Tensor]
) -> None:
    """A batch that is embedded in pieces: each piece's second pass is of the gradient's."""
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    embedding_model(model, "mean", token_budget=41)
    layout = SequenceLayout.from_lengths(LENGTHS)
    rows = model(**packed(*LENGTHS), layout=layout, embed=True).rows
    assert rows.shape == (4, 32)
    first = list(noise)
    assert len(first) == 3  # the budget makes pieces of 3, of 40 and 1, and of 17 tokens
    noise.clear()
    rows.sum().backward()
    bits = {x.numpy().tobytes() for x in noise}
    assert {x.numpy().tobytes() for x in first} == bits


def test_training_has_it_once(settings: Callable[..., dict[str, object]], monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' own hook stays away."""
    monkeypatch.setattr("transformers.trainer.activate_neftune", lambda *_: pytest.fail("took a batch for a sequence"))
    losses = [
        train_mntp(MntpArguments(**settings(f"out-{alpha}", max_steps=1, neftune_noise_alpha=alpha))).training_loss
        for alpha in (None, 0.0, 20.0)
    ]
    assert losses[0] == losses[1] != losses[2]
