"""`python -m benchmarks.codegen`: compile every kernel for every architecture, report what came out, apply the gate."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import triton

from benchmarks.codegen.compiling import TARGETS
from benchmarks.codegen.measuring import Task, measure_all
from benchmarks.codegen.report import page, problems, table
from benchmarks.codegen.results import Results
from benchmarks.codegen.variants import (
    Allowance,
    allowance_for,
    families,
    most_instructions_of,
    recorded,
    variants_of,
)


def main() -> None:
    """Parse the command line, compile, print the table, and exit with 1 where a kernel fails the gate."""
    known = families()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.codegen", description=__doc__)
    parser.add_argument("--main", action="store_true", help="only the configurations most models run")
    parser.add_argument("--arch", nargs="+", choices=TARGETS, default=list(TARGETS), help="architectures (all)")
    parser.add_argument("--family", nargs="+", choices=known, default=known, help="families of kernels (all)")
    parser.add_argument("--only", default="", help="only kernels whose name holds this text")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile (one a core)")
    parser.add_argument("--json", type=Path, help="keep every figure in this file; what it knows is not compiled again")
    parser.add_argument("--again", action="store_true", help="compile also what the file knows")
    parser.add_argument("--markdown", type=Path, help="also write all that the file knows as tables to this one")
    arguments = parser.parse_args()
    figures = recorded(known)
    results = Results(arguments.json, figures)
    failures = _compile(_tasks(arguments), results, arguments)
    results.save()
    if arguments.markdown:
        arguments.markdown.write_text(page(results.entries(), figures))
    print(*failures, sep="\n", file=sys.stderr)
    sys.exit(1 if failures else 0)


def _tasks(arguments: argparse.Namespace) -> list[Task]:
    return [
        Task(family, architecture, arguments.main, variant.name)
        for family in arguments.family
        for architecture in arguments.arch
        for variant in variants_of(family, architecture, arguments.main)
        if arguments.only in variant.name
    ]


def _compile(tasks: list[Task], results: Results, arguments: argparse.Namespace) -> list[str]:
    """Print the tasks' rows, keep them, and say what failed the gate."""
    if not arguments.main and not arguments.only:
        for family, architecture in {task[:2] for task in tasks}:
            results.forget_all_but(
                family, architecture, [task.name for task in tasks if task[:2] == (family, architecture)]
            )
    rows = {task: None if arguments.again else results.known(task.variant(), task.architecture) for task in tasks}
    for task, row in measure_all([task for task in tasks if rows[task] is None], arguments.jobs):
        rows[task] = row
        results.add(task.family, task.variant(), row)
        results.save()  # at once, for all of them take an hour
    print(f"Triton {triton.__version__}", table(rows.values()), sep="\n\n")
    return [
        f"{task.name} on {task.architecture}: {problem}"
        for task, row in rows.items()
        for problem in problems(row, task.variant(), _allowed(task), _most_instructions(task))
    ]


def _allowed(task: Task) -> Allowance:
    return allowance_for(task.family, task.name, task.architecture, triton.__version__)


def _most_instructions(task: Task) -> int | None:
    return most_instructions_of(task.family, task.name, task.architecture)


if __name__ == "__main__":
    main()
