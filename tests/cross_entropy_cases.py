"""What the cross-entropy tests share: inputs, and runs whose unwritten elements show as NaN."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from attention_cases import uninitialised_memory_is_nan
from torch import Tensor

from llm2vec_fast.kernels.cross_entropy import linear_cross_entropy

IGNORED = -100


@dataclass(frozen=True)
class Case:
    """One call of linear_cross_entropy; prints as a readable test id."""

    rows: int
    vocabulary: int
    width: int
    labelled: float = 0.3
    bias: bool = False
    settings: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        settings = "".join(f"-{name}{value}" for name, value in self.settings.items())
        return f"T{self.rows}-V{self.vocabulary}-d{self.width}-{self.labelled:.0%}{'-bias' * self.bias}{settings}"

    def tensors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
        """hidden, weight, bias; logits have a standard deviation of 3, and each label is often the likeliest."""
        generator = torch.Generator().manual_seed(len(str(self)))
        weight = torch.randn(self.vocabulary, self.width, generator=generator)
        hidden = torch.randn(self.rows, self.width, generator=generator) * 3 / self.width**0.5
        half = self.labels()[::2]
        hidden[::2] += weight[half.clamp(min=0)] * 3 / self.width
        bias = torch.randn(self.vocabulary, generator=generator) if self.bias else None
        return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)

    def labels(self) -> Tensor:
        """(T,) int64, the share ``labelled`` of them not ignored."""
        generator = torch.Generator().manual_seed(self.rows)
        labels = torch.randint(self.vocabulary, (self.rows,), generator=generator)
        kept = torch.rand(self.rows, generator=generator) < self.labelled
        ignored = self.settings.get("ignore_index", IGNORED)
        return labels.where(kept, ignored)


def everything(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, **settings: Any
) -> dict[str, Tensor]:
    """Loss, log-probabilities and accuracy; also the last two are compared."""
    out = linear_cross_entropy(
        hidden, weight, labels, bias=bias, return_accuracy=True, return_log_probs=True, **settings
    )
    return {"loss": out.loss, "log_probs": out.log_probs}


def gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, passes: int = 1, **settings: Any
) -> dict[str, Tensor]:
    """dhidden, dweight, dbias for an upstream gradient that is the same in every dtype, and is not 1.

    They are those of the last of so many backward ``passes``.
    """
    tensors = {"dhidden": hidden, "dweight": weight, "dbias": bias}
    tensors = {name: x.detach().requires_grad_() for name, x in tensors.items() if x is not None}
    loss = linear_cross_entropy(tensors["dhidden"], tensors["dweight"], labels, bias=tensors.get("dbias"), **settings)
    upstream = torch.randn(loss.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float16)
    for again in reversed(range(passes)):
        found = torch.autograd.grad(loss, list(tensors.values()), upstream.to(loss.dtype), retain_graph=again > 0)
    return dict(zip(tensors, found, strict=True))


def three_ways(
    case: Case, dtype: torch.dtype, backend: str, call: Callable[..., dict[str, Tensor]]
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """By name of the result: by ``backend``, by plain PyTorch in the same dtype, and in float64."""
    tensors, labels = case.tensors(dtype), case.labels()
    doubles = [None if x is None else x.double() for x in tensors]
    with uninitialised_memory_is_nan():
        ours = call(*tensors, labels, backend=backend, **case.settings)
    plain = call(*tensors, labels, backend="reference", **case.settings)
    exact = call(*doubles, labels, backend="reference", **case.settings)
    return {name: (ours[name], plain[name], exact[name]) for name in ours}
