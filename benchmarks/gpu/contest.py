"""Contenders for one piece of work: compared with the exact result first, timed only if right."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from numerics import GRADIENT_FACTOR, OUTPUT_FACTOR, assert_error_within
from torch import Tensor

from benchmarks.gpu.section import NotAvailableError, Row
from benchmarks.gpu.timing import Clock, peak_extra_mib
from llm2vec_fast.kernels.dispatch import BackendUnavailableError


def _same(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Contender:
    """One way to do the work.

    Attributes:
        forward: from ``inputs`` to a tensor, or several.
        inputs: in whatever layout it likes; gradients are taken of those that require one.
        upstream: the gradient of each of its outputs.
        comparable: from its layout (of outputs and gradients alike) to the part that the truth covers.
        note: what else a reader should know.
    """

    forward: Callable[..., Tensor | tuple[Tensor, ...]]
    inputs: tuple[Tensor, ...]
    upstream: tuple[Tensor, ...]
    comparable: Callable[[Tensor], Tensor] = _same
    note: str = ""

    def outputs(self) -> tuple[Tensor, ...]:
        out = self.forward(*self.inputs)
        return out if isinstance(out, tuple) else (out,)

    def gradients(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        wanted = [x for x in self.inputs if x.requires_grad]
        return torch.autograd.grad(outputs, wanted, self.upstream, retain_graph=True)


@dataclass(frozen=True)
class Work:
    """What is to be done, and what is right.

    Attributes:
        name: of the case.
        exact: outputs, then gradients, in float64.
        plain: the same by plain PyTorch in the contenders' dtype: what the tolerance rule allows is measured by it.
        amount: of each timed pass ("forward"; "backward" after a forward pass; "both"), GFLOP or MB.
        unit: of amount over milliseconds: "TFLOP/s" or "GB/s".
        peak: measured rate of the device to hold it against, None where there is none.
    """

    name: str
    exact: tuple[Tensor, ...]
    plain: tuple[Tensor, ...]
    amount: dict[str, float]
    unit: str = "TFLOP/s"
    peak: float | None = None


def compete(work: Work, makers: dict[str, Callable[[], Contender]], clock: Clock, smoke: bool) -> Iterator[Row]:
    """One row a contender and pass. A contender that cannot be made or run gets one row that says why.

    ``makers`` are called one at a time, so that only one contender's tensors are held at once.
    """
    for name, make in makers.items():
        row = {"case": work.name, "contender": name}
        try:
            contender = make()
            verdict = judge(work, contender)
            if verdict is None:
                yield from _timed(work, contender, row, clock, smoke)
            else:
                yield row | {"verdict": "wrong", "note": verdict}
        except (BackendUnavailableError, NotAvailableError) as reason:
            yield row | {"verdict": "not available", "note": str(reason)}
        except torch.OutOfMemoryError:
            yield row | {"verdict": "out of memory"}
        contender = None
        if not smoke:
            torch.cuda.empty_cache()


def judge(work: Work, contender: Contender) -> str | None:
    """Why an output or a gradient is wrong, by the tolerance rule of the tests; None where all are right."""
    outputs = contender.outputs()
    results = (*outputs, *contender.gradients(outputs))
    for i, (ours, plain, exact) in enumerate(zip(results, work.plain, work.exact, strict=True)):
        name = f"output {i}" if i < len(outputs) else f"gradient {i - len(outputs)}"
        factor = OUTPUT_FACTOR if i < len(outputs) else GRADIENT_FACTOR
        try:
            assert_error_within(contender.comparable(ours), plain, exact, factor, name)
        except AssertionError as difference:
            return str(difference)
    return None


def _timed(work: Work, contender: Contender, row: Row, clock: Clock, smoke: bool) -> Iterator[Row]:
    def forward() -> object:
        with torch.no_grad():
            return contender.outputs()

    def both() -> object:
        return contender.gradients(contender.outputs())

    memory = peak_extra_mib(both, smoke)
    for which, amount in work.amount.items():
        run = {"forward": forward, "both": both}.get(which)
        if run is None:
            run = functools.partial(contender.gradients, contender.outputs())
        milliseconds = clock.milliseconds(run)
        rate = None if milliseconds is None else amount / milliseconds
        yield row | {
            "pass": which,
            "verdict": "right",
            "ms": milliseconds,
            "rate": rate,
            "unit": work.unit,
            "of peak": rate / work.peak if rate and work.peak else None,
            "peak extra MiB": memory,
            "note": contender.note,
        }
