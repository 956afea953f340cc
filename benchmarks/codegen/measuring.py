"""Compiles many kernels at once."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from typing import NamedTuple

from triton import knobs

from benchmarks.codegen.compiling import Variant
from benchmarks.codegen.rows import Row, measure
from benchmarks.codegen.variants import variants_of


class Task(NamedTuple):
    """A kernel by name, for compiled functions do not travel between processes."""

    family: str
    architecture: str
    main_only: bool
    name: str

    def variant(self) -> Variant:
        """The kernel itself."""
        return _variants(*self[:3])[self.name]


def measure_all(tasks: list[Task], jobs: int) -> Iterator[tuple[Task, Row]]:
    """Each task with its row, as they are done."""
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"))
    try:
        task_of = {pool.submit(_measure_one, task): task for task in tasks}
        for done in as_completed(task_of):
            yield task_of[done], done.result()
    finally:
        pool.shutdown(cancel_futures=True)


@cache
def _variants(family: str, architecture: str, main_only: bool) -> dict[str, Variant]:
    return {variant.name: variant for variant in variants_of(family, architecture, main_only)}


def _measure_one(task: Task) -> Row:
    knobs.compilation.always_compile = True  # a cached kernel would take no time to compile
    return measure(task.variant(), task.architecture)
