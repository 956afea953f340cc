"""`python -m benchmarks.codegen`: compile every kernel for every architecture and report what came out."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from triton import knobs

from benchmarks.codegen.compiling import TARGETS
from benchmarks.codegen.report import measure, problems, table, write_json
from benchmarks.codegen.variants import all_variants, main_variants


def main() -> None:
    """Parse the command line, compile, print the table, and exit with 1 where a kernel fails the gate."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.codegen", description=__doc__)
    parser.add_argument("--main", action="store_true", help="only the configurations most models run")
    parser.add_argument("--arch", nargs="+", choices=TARGETS, default=list(TARGETS), help="architectures (all)")
    parser.add_argument("--json", type=Path, help="also write every figure to this file")
    arguments = parser.parse_args()
    knobs.compilation.always_compile = True  # a cached kernel would take no time to compile
    variants = main_variants if arguments.main else all_variants
    rows = [measure(variant, name) for name in arguments.arch for variant in variants(name)]
    print(table(rows))
    if arguments.json:
        write_json(rows, arguments.json)
    failures = [f"{row.name} on {row.architecture}: {problem}" for row in rows for problem in problems(row)]
    print(*failures, sep="\n", file=sys.stderr)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
