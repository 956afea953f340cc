"""Every parameter's gradient is as exact as stock transformers', one text at a time, through every backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from numerics import GRADIENT_FACTOR, assert_error_within
from tiny_models import SHAPE, WINDOW, tiny_model
from torch import Tensor
from torch.overrides import TorchFunctionMode

from llm2vec_fast.bidirectional import make_bidirectional
from llm2vec_fast.kernels.dispatch import ENVIRONMENT_VARIABLE
from llm2vec_fast.kernels.layout import SequenceLayout

LENGTHS = (13, 1, 7, 24, 23)
assert max(LENGTHS) > 2 * WINDOW


class InFloat64(TorchFunctionMode):
    """Inside, what asks for float32 gets float64: stock models cast their softmax, norms and angles to float32."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        args = tuple(_widened(x) for x in args)
        return func(*args, **{name: _widened(x) for name, x in (kwargs or {}).items()})


def _widened(x: Any) -> Any:
    return torch.float64 if x is torch.float32 else x


def texts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, SHAPE["vocab_size"], (n,), generator=generator) for n in LENGTHS]


def weighted(hidden: Tensor) -> Tensor:
    """A loss whose gradient differs from token to token."""
    weights = torch.randn(sum(LENGTHS), hidden.shape[-1], generator=torch.Generator().manual_seed(2))
    return (hidden * weights.to(hidden.dtype)).sum()


def gradients(model: torch.nn.Module, hidden: Tensor) -> dict[str, Tensor]:
    weighted(hidden).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def stock(family: str, is_causal: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    """The definition: stock transformers, eager attention, one text at a time."""
    model = tiny_model(family, num_hidden_layers=2).to(dtype)
    model.config.is_causal = is_causal
    outputs = [model(input_ids=ids[None], use_cache=False).last_hidden_state[0] for ids in texts()]
    return gradients(model, torch.cat(outputs))


def packed(family: str, is_causal: bool) -> dict[str, Tensor]:
    model = make_bidirectional(tiny_model(family, num_hidden_layers=2), enabled=not is_causal)
    layout = SequenceLayout.from_lengths(LENGTHS)
    return gradients(model, model(input_ids=torch.cat(texts())[None], layout=layout).last_hidden_state[0])


@pytest.mark.parametrize("family", ["llama", "mistral-window"])
@pytest.mark.parametrize(("backend", "is_causal"), [("triton", False), ("blocked", False), ("blocked", True)])
def test_every_gradient_equals_stock_eager_one_text_at_a_time(
    monkeypatch: pytest.MonkeyPatch, backend: str, family: str, is_causal: bool
) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, backend)
    ours, plain = packed(family, is_causal), stock(family, is_causal, torch.float32)
    with InFloat64():
        exact = stock(family, is_causal, torch.float64)
    assert all(gradient.any() for gradient in exact.values())
    for name, gradient in exact.items():
        assert_error_within(ours[name], plain[name], gradient, factor=GRADIENT_FACTOR, name=name)
