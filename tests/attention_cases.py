"""What the attention tests share: layouts, inputs, and runs whose unwritten elements show as NaN."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from llm2vec_fast.kernels.attention import attention
from llm2vec_fast.kernels.layout import SequenceLayout

LAYOUTS = ("packed", "left", "right", "both")


@dataclass(frozen=True)
class Case:
    """One call of attention; prints as a readable test id."""

    lengths: tuple[int, ...]
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 32
    layout: str = "packed"
    settings: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        settings = "".join(f"-{name}{value}" for name, value in self.settings.items())
        lengths = ",".join(map(str, self.lengths[:5])) + ("…" if len(self.lengths) > 5 else "")
        return f"{self.layout}-T{lengths}-H{self.heads}-KV{self.kv_heads}-D{self.head_dim}{settings}"

    def sequence_layout(self) -> SequenceLayout:
        return make_layout(self.layout, self.lengths)

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v as slices of one fused projection, so that every test reads strided views."""
        total = self.sequence_layout().total
        generator = torch.Generator().manual_seed(len(str(self)))
        heads = self.heads + 2 * self.kv_heads
        fused = torch.randn(total, heads * self.head_dim, generator=generator).to(dtype)
        q, k, v = fused.view(total, heads, self.head_dim).split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        return q, k, v


def planned(plan: Sequence[Mapping[str, Any]], halves: Mapping[str, torch.dtype]) -> list[Any]:
    """Cases of a pairwise plan as parameters (case, backend, dtype), each backend in its 16-bit dtype or in float32."""
    parameters = []
    for backend, half in halves.items():
        for chosen in map(dict, plan):
            (heads, kv_heads), dtype = chosen.pop("heads"), half if chosen.pop("half") else torch.float32
            case = Case(heads=heads, kv_heads=kv_heads, **chosen)
            parameters.append(pytest.param(case, backend, dtype, id=f"{backend}-{str(dtype)[6:]}-{case}"))
    return parameters


def make_layout(kind: str, lengths: tuple[int, ...]) -> SequenceLayout:
    """A packed layout, or one padded on the left, the right, or alternately on both sides."""
    if kind == "packed":
        return SequenceLayout.from_lengths(lengths)
    width = max(lengths, default=0) + (3 if kind == "both" else 0)
    mask = torch.zeros(len(lengths), width, dtype=torch.int64)
    for row, length in enumerate(lengths):
        first = {"left": width - length, "right": 0, "both": (width - length) // 2}[kind]
        mask[row, first : first + length] = 1
    return SequenceLayout.from_attention_mask(mask)


@contextmanager
def uninitialised_memory_is_nan() -> Iterator[None]:
    """Inside, torch.empty is filled with NaN: an element that a kernel leaves unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def three_ways(
    case: Case,
    dtype: torch.dtype,
    backend: str,
    tensors: tuple[Tensor, ...] | None = None,
    call: Callable[..., Any] = attention,
) -> tuple[Any, Any, Any]:
    """The case by ``backend``, by plain PyTorch in the same dtype, and in float64; ``tensors`` replace its q, k, v."""
    layout = case.sequence_layout()
    tensors = case.inputs(dtype) if tensors is None else tensors
    with uninitialised_memory_is_nan():
        ours = call(*tensors, layout, backend=backend, **case.settings)
    plain = call(*tensors, layout, backend="reference", **case.settings)
    exact = call(*(x.double() for x in tensors), layout, backend="reference", **case.settings)
    return ours, plain, exact
