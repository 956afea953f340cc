"""A section of the GPU suite, and what it is told."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, NamedTuple

Row = dict[str, Any]


class NotAvailableError(Exception):
    """What a section would measure does not exist here; the message says what is missing."""


@dataclass
class Context:
    """What a section is told.

    Attributes:
        smoke: tiny shapes on the CPU, by Triton's interpreter; nothing is timed.
        seconds: the section's time, counted from when this was made; whatever is left then is cut off.
        peaks: rates measured on this device beforehand: "matmul TFLOP/s" and "copy GB/s".
    """

    smoke: bool
    seconds: float
    peaks: dict[str, float] = field(default_factory=dict)
    _began: float = field(default_factory=time.monotonic)

    @property
    def device(self) -> str:
        return "cpu" if self.smoke else "cuda"

    def left(self) -> float:
        """Seconds until the section is cut off."""
        return self.seconds - (time.monotonic() - self._began)


class Section(NamedTuple):
    """A section's name, which is also its module's in `benchmarks.gpu.sections`, and the seconds it may take."""

    name: str
    seconds: float

    def rows(self, context: Context) -> Iterator[Row]:
        """What it finds, one dictionary after the other.

        Raises:
            NotAvailableError: there is nothing to measure here.
        """
        module = import_module(f"benchmarks.gpu.sections.{self.name}")
        from llm2vec_fast.kernels.dispatch import BackendUnavailableError

        try:
            yield from module.rows(context)
        except BackendUnavailableError as reason:
            raise NotAvailableError(str(reason)) from None


# In this order: the later ones need the peaks, and where time runs out the last ones lose. 452 seconds in all, and no
# section gets more than its own, so that the whole stays under eight minutes.
SECTIONS = (
    Section("peaks", 20),
    Section("kernel_tests", 120),
    Section("attention", 145),
    Section("linear_cross_entropy", 35),
    Section("contrastive_loss", 30),
    Section("rms_norm", 8),
    Section("rotary", 8),
    Section("swiglu", 8),
    Section("pooling", 8),
    Section("sweep", 70),
)
SECONDS = sum(section.seconds for section in SECTIONS)
