"""Checks and measures the kernels on a GPU, in under eight minutes on one H100.

    python benchmarks/gpu_suite.py                     # needs PyTorch, Triton, pytest; nothing has to be installed
    python benchmarks/gpu_suite.py --smoke             # on a CPU: shows that the suite runs, times nothing

It runs the kernels' tests on the device; times attention against its peers, whose results are compared first; does the
same for the losses and the element-wise operations; and tries the attention kernels' configurations against others like
them. What it finds goes to `benchmarks/results/gpu.json` as it is found.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.gpu.section import SECONDS, SECTIONS
from benchmarks.gpu.targets import Goal, goals

SMOKE_SECONDS = 120.0  # a section takes a few; a busy machine may take much longer
RESULTS = Path(__file__).parent / "results" / "gpu.json"


def main(arguments: list[str] | None = None) -> int:
    """Run the sections asked for; 0 where nothing is wrong, failed or cut off."""
    options = _parser().parse_args(arguments)
    if options.smoke:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    elif not _in_a_process_of_its_own(_has_gpu):
        print("no GPU that PyTorch can use: run with --smoke to try the suite on a CPU", file=sys.stderr)
        return 2
    from benchmarks.gpu.runner import clean, run

    sections = [section for section in SECTIONS if section.name in (options.only or [s.name for s in SECTIONS])]
    if options.smoke:
        sections = [section._replace(seconds=SMOKE_SECONDS) for section in sections]
    output = options.output or (None if options.smoke else RESULTS)
    seconds = options.seconds or (len(sections) * SMOKE_SECONDS if options.smoke else SECONDS)
    found = run(sections, options.smoke, seconds, output)
    if not options.smoke:
        print("\ntargets")
        for goal in goals(found["sections"]):
            print(_goal_line(goal))
    if output is not None:
        print(f"\nwritten to {output}")
    return 0 if clean(found) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes by Triton's interpreter, without a GPU")
    parser.add_argument("--only", nargs="+", choices=[s.name for s in SECTIONS], help="these sections (all)")
    parser.add_argument("--output", type=Path, help="JSON file (benchmarks/results/gpu.json; none for --smoke)")
    parser.add_argument("--seconds", type=float, help=f"stop after so many in all ({SECONDS:.0f})")
    return parser


def _goal_line(goal: Goal) -> str:
    sign = "≤" if goal.at_most else "≥"
    if goal.figure is None:
        return f"  not measured: {goal.name} ({sign} {goal.goal:g} {goal.unit})"
    verdict = "reached" if goal.reached else "missed"
    return f"  {verdict}: {goal.name}: {goal.figure:.3g} {goal.unit} ({sign} {goal.goal:g})"


def _has_gpu() -> None:
    import torch

    sys.exit(0 if torch.cuda.is_available() else 1)


def _in_a_process_of_its_own(check: object) -> bool:
    """A process that has asked for the device cannot fork others that use it."""
    process = multiprocessing.get_context("fork").Process(target=check)
    process.start()
    process.join()
    return process.exitcode == 0


if __name__ == "__main__":
    sys.exit(main())
