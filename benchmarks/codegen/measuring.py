"""Compiles many kernels at once and holds each to the gate."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

from triton import knobs

from benchmarks.codegen.report import Row, measure, problems
from benchmarks.codegen.variants import allowance_for, variants_of


class Task(NamedTuple):
    """A kernel by name, for compiled functions do not travel between processes."""

    family: str
    architecture: str
    main_only: bool
    name: str


def measure_all(tasks: list[Task], jobs: int) -> tuple[list[Row], list[str]]:
    """Rows in the order of the tasks, and what failed the gate, in words."""
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        results = list(pool.map(_measure_one, tasks))
    failures = [f"{row.name} on {row.architecture}: {problem}" for row, found in results for problem in found]
    return [row for row, _ in results], failures


def _measure_one(task: Task) -> tuple[Row, list[str]]:
    knobs.compilation.always_compile = True  # a cached kernel would take no time to compile
    candidates = variants_of(task.family, task.architecture, task.main_only)
    variant = next(x for x in candidates if x.name == task.name)
    row = measure(variant, task.architecture)
    return row, problems(row, variant, allowance_for(task.family, task.name, task.architecture))
