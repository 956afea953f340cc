"""With dropout no stock run draws the same, but a gradient is right if the loss changes along it as fast as it says.

The loss is taken a little before and a little behind, by the same step with the same random numbers: what is dropped
must not depend on whether a graph is kept, on pieces, or on what is computed again for the backward pass. Stages are
measured inside a run; `GradCache` in a loop of its own, and there, without dropout, against the stock model, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from pairwise import pairwise
from peft import LoraConfig, get_peft_model
from recorded_training import run_with
from stock_training import info_nce, load_stock, outputs_of, pooled
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from training_cases import AXES, Case, Materials, name_of, options_of, settled

from llm2vec_fast import accelerate, make_bidirectional
from llm2vec_fast.kernels import contrastive_loss
from llm2vec_fast.training import GradCache
from llm2vec_fast.training.run import StageTrainer

MOVED = 0.02  # of the loss: how much it changes between here and either side, were it straight
BENT = 0.02  # of the slope, more than the loss bends over that; another mask is off by a tenth and more
LORA = ["q_proj", "v_proj", "up_proj", "query_key_value", "dense_h_to_4h", "c_attn", "qkv_proj", "down_proj"]

Parameters = Sequence[nn.Parameter]


def off_zero(parameters: Parameters) -> None:
    """An adapter's second factor is zero at first, and the gradient of its first factor with it."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for x in parameters:
            if not x.any():
                x.normal_(std=0.1, generator=draw)


def slope_and_norm(step: Callable[[], Tensor], parameters: Parameters) -> tuple[float, float]:
    """How fast the loss of a step changes along its gradient, and the norm of that gradient, which is the same."""
    state = torch.get_rng_state()

    def loss_at(distance: float) -> float:
        with moved(parameters, directions, distance):
            torch.set_rng_state(state)
            return float(step())

    here = float(step())
    gradients = [torch.zeros_like(x) if x.grad is None else x.grad.clone() for x in parameters]
    norm = float(torch.stack([x.norm() for x in gradients]).norm())
    directions = [x / norm for x in gradients]
    distance = MOVED * here / norm
    return (loss_at(distance) - loss_at(-distance)) / (2 * distance), norm


@contextmanager
def moved(parameters: Parameters, directions: Sequence[Tensor], distance: float) -> Iterator[None]:
    with torch.no_grad():
        before = [x.clone() for x in parameters]
        for x, direction in zip(parameters, directions, strict=True):
            x.add_(direction, alpha=distance)
    yield
    with torch.no_grad():
        for x, old in zip(parameters, before, strict=True):
            x.copy_(old)


def dropout_cases() -> list[Case]:
    rest = {name: values[0] for name, values in AXES.items()}
    cases = pairwise(
        stage=("mntp", "simcse", "negatives"),
        family=("llama", "phi3", "gemma2", "gpt_neox"),
        adapter=("new", "continued", "all-weights"),
        checkpointing=("", "reentrant", "non-reentrant"),
        budget=(None, 20),
        lora_dropout=(0.05, 0.3, 0.0),
        attention_dropout=(0.0, 0.3),
    )
    return [settled({**rest, **case, "seed": i}) for i, case in enumerate(cases)]


@pytest.mark.parametrize("case", dropout_cases(), ids=name_of)
def test_the_gradient_of_a_run_is_the_slope_of_its_loss(case: Case, materials: Materials, tmp_path: Path) -> None:
    stage, options = options_of(case, materials, tmp_path)
    options |= {"max_steps": 1, "lora_dropout": case["lora_dropout"]}
    if stage != "mntp":
        options["attention_dropout"] = case["attention_dropout"]
    take, found = StageTrainer.training_step, []

    def measured(self: StageTrainer, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        parameters = [x for x in model.parameters() if x.requires_grad]
        off_zero(parameters)
        found.append(slope_and_norm(lambda: take(self, model, dict(inputs), *args, **kwargs), parameters))
        return torch.zeros(())

    run_with(measured, stage, options)
    slope, norm = found[0]
    assert slope == pytest.approx(norm, rel=BENT)


def cached_cases() -> list[Mapping[str, Any]]:
    return pairwise(
        family=("llama", "gemma2", "gpt2", "gpt_neox"),
        dropout=(0.0, 0.05, 0.3),
        checkpointing=("", "reentrant", "non-reentrant"),
        accelerated=(True, False),
        adapter=(True, False),
        chunk=(3, 1, 20),
    )


@pytest.mark.parametrize("case", cached_cases(), ids=lambda case: "-".join(map(str, case.values())))
def test_grad_cache_in_a_loop_of_ones_own(case: Mapping[str, Any], materials: Materials) -> None:
    texts = [torch.randint(3, 300, (n,), generator=torch.Generator().manual_seed(n)) for n in (3, 9, 5, 7, 4, 8, 6, 2)]
    model = make_bidirectional(_adapted(case, materials))
    if case["checkpointing"]:
        model.gradient_checkpointing_enable({"use_reentrant": case["checkpointing"] == "reentrant"})
        model.enable_input_require_grads()
    if case["accelerated"]:
        accelerate(model)
    parameters = [x for x in model.train().parameters() if x.requires_grad]
    cache = GradCache(
        lambda batch: _mean(model(**batch).last_hidden_state, batch["attention_mask"]),
        lambda queries, documents: contrastive_loss(queries, documents, scale=5.0), case["chunk"], model=model,
    )  # fmt: skip

    def step() -> Tensor:
        model.zero_grad()
        return cache(_padded(texts[:3]), _padded(texts[3:]))

    slope, norm = slope_and_norm(step, parameters)
    assert slope == pytest.approx(norm, rel=BENT)
    if case["dropout"]:
        return
    loss = step()
    stock = _adapted(case, materials)
    rows = torch.stack([pooled(outputs_of(stock, ids), "mean") for ids in texts])
    expected = info_nce(rows[:3], rows[3:], torch.eye(3, 5).bool(), torch.eye(3).bool(), 5.0)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    for found, x in zip(parameters, (x for x in stock.parameters() if x.requires_grad), strict=True):
        assert float((found.grad - x.grad).norm()) <= 1e-4 * max(float(x.grad.norm()), norm / 100)


def _adapted(case: Mapping[str, Any], materials: Materials) -> nn.Module:
    """The same weights at every call."""
    model = load_stock(materials.decoder(case["family"]))
    if not case["adapter"]:
        return model
    targets = [name for name in LORA if any(layer.endswith(f".{name}") for layer, _ in model.named_modules())]
    model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, lora_dropout=case["dropout"]))
    for x in model.parameters():
        if x.requires_grad:
            x.data.normal_(std=0.1, generator=torch.Generator().manual_seed(x.numel()))
    return model


def _padded(texts: Sequence[Tensor]) -> dict[str, Tensor]:
    mask = pad_sequence([torch.ones_like(x) for x in texts], batch_first=True)
    return {"input_ids": pad_sequence(list(texts), batch_first=True), "attention_mask": mask}


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
