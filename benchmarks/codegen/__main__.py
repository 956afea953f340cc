"""`python -m benchmarks.codegen`: compile every kernel for every architecture and report what came out."""

from __future__ import annotations

import argparse

from benchmarks.codegen.compiling import TARGETS, compile_for
from benchmarks.codegen.variants import main_variants


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.codegen", description=__doc__)
    parser.add_argument("--compile-only", action="store_true", help="compile the main configurations, report nothing")
    parser.parse_args()
    for architecture in TARGETS:
        for variant in main_variants(architecture):
            compile_for(variant, architecture)


if __name__ == "__main__":
    main()
