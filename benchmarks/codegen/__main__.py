"""`python -m benchmarks.codegen`: compile every kernel for every architecture, report what came out, apply the gate."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import triton

from benchmarks.codegen.compiling import TARGETS
from benchmarks.codegen.measuring import Task, measure_all
from benchmarks.codegen.report import as_json, recorded_table, table
from benchmarks.codegen.variants import families, recorded, variants_of
from benchmarks.report import write_json

TITLE = """# What the kernels compile to

Compiled ahead of time by Triton {version}, without a GPU: nothing here was timed. Written by `make codegen`.

wi/MF: warp instructions per MFLOP of the leanest inner loop (lower is better). limit: the pipe that bounds the loop.
overlap, serial: share of the tensor peak that the counts allow if all pipes overlap perfectly, or not at all.
"""
RECORDED = """
## Other people's kernels

Recorded in an earlier study with the same compiler and the same counting; not compiled here.

"""


def main() -> None:
    """Parse the command line, compile, print the table, and exit with 1 where a kernel fails the gate."""
    known = families()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.codegen", description=__doc__)
    parser.add_argument("--main", action="store_true", help="only the configurations most models run")
    parser.add_argument("--arch", nargs="+", choices=TARGETS, default=list(TARGETS), help="architectures (all)")
    parser.add_argument("--family", nargs="+", choices=known, default=known, help="families of kernels (all)")
    parser.add_argument("--only", default="", help="only kernels whose name holds this text")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile (one a core)")
    parser.add_argument("--json", type=Path, help="also write every figure to this file")
    parser.add_argument("--markdown", type=Path, help="also write the tables to this file")
    arguments = parser.parse_args()
    tasks = [
        Task(family, architecture, arguments.main, variant.name)
        for family in arguments.family
        for architecture in arguments.arch
        for variant in variants_of(family, architecture, arguments.main)
        if arguments.only in variant.name
    ]
    rows, failures = measure_all(tasks, arguments.jobs)
    figures = recorded(arguments.family)
    print(table(rows))
    if arguments.json:
        write_json(arguments.json, {"triton": triton.__version__, **as_json(rows, figures)})
    if arguments.markdown:
        text = TITLE.format(version=triton.__version__) + "\n" + table(rows)
        arguments.markdown.write_text(text + "\n" + (RECORDED + recorded_table(figures) + "\n" if figures else ""))
    print(*failures, sep="\n", file=sys.stderr)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
