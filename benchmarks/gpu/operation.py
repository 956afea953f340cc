"""Operations of `llm2vec_fast.kernels` that a section measures, if they are there."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.contest import Contender, Work, compete
from benchmarks.gpu.section import Context, NotAvailableError, Row
from benchmarks.gpu.timing import Clock
from llm2vec_fast import kernels

# Checking a result takes longer than computing it: every so many rows of large tensors are compared.
JUDGED_ROWS = 16


def resolve(name: str) -> Callable[..., Any]:
    """The operation.

    Raises:
        NotAvailableError: it does not exist, or has no Triton kernels.
    """
    operation = getattr(kernels, name, None)
    if not callable(operation):
        raise NotAvailableError(f"there is no {name} among the kernels")
    return operation


def compare_with_reference(
    context: Context,
    case: str,
    call: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: tuple[Tensor, ...],
    megabytes: dict[str, float],
    given: int = 0,
) -> Iterator[Row]:
    """A memory-bound operation, ``call(*inputs, backend=…)``: by Triton and by its definition in plain PyTorch.

    ``megabytes`` are those that each pass cannot but move; the last ``given`` inputs need no gradient.
    """
    with torch.no_grad():
        outputs = _as_tuple(call(*inputs, backend="triton"))  # an operation without Triton kernels says so here
    upstream = tuple(torch.randn_like(x) for x in outputs)
    rows = inputs[0].shape[0]

    def comparable(x: Tensor) -> Tensor:
        return x[::JUDGED_ROWS] if x.shape[0] == rows else x

    truths = []
    for dtype in (torch.float64, inputs[0].dtype):
        contender = _contender(call, "reference", inputs, upstream, given, dtype)
        outputs = contender.outputs()
        truths.append(tuple(comparable(x.detach()) for x in (*outputs, *contender.gradients(outputs))))
    work = Work(case, *truths, megabytes, "GB/s", context.peaks.get("copy GB/s"))
    makers = {
        name: functools.partial(_contender, call, backend, inputs, upstream, given, None, comparable)
        for name, backend in (("ours, Triton", "triton"), ("plain PyTorch", "reference"))
    }
    yield from compete(work, makers, Clock(context.smoke), context.smoke)


def _contender(
    call: Callable[..., Any],
    backend: str,
    inputs: tuple[Tensor, ...],
    upstream: tuple[Tensor, ...],
    given: int,
    dtype: torch.dtype | None = None,
    comparable: Callable[[Tensor], Tensor] = lambda x: x,
) -> Contender:
    """``dtype`` casts whatever is in the first input's dtype; float32 results (of pooling) become float64 as well."""
    double = dtype == torch.float64

    def cast(x: Tensor) -> Tensor:
        return x.detach().to(torch.float64) if double and x.is_floating_point() else x.detach()

    wanted = len(inputs) - given
    leaves = tuple(cast(x).requires_grad_(i < wanted) for i, x in enumerate(inputs))
    return Contender(
        lambda *tensors: call(*tensors, backend=backend), leaves, tuple(cast(x) for x in upstream), comparable
    )


def _as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)
