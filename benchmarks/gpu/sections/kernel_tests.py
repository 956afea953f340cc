"""The kernels' tests on the device, in every dtype, by the tolerance rule: without them no measurement counts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from benchmarks.gpu import test_log
from benchmarks.gpu.place import ROOT
from benchmarks.gpu.section import Context, Row

TESTS = ("tests/kernels",)
SMOKE_TESTS = ("tests/kernels/attention/test_forward.py", "-k", "of_every_size and triton-float16 and T1-H2")
WORKERS = 8  # compiling takes most of the time, and processors
SECONDS_TO_STOP = 3.0


def rows(context: Context) -> Iterator[Row]:
    """A row a failure as it happens, and a last row with the counts, complete or cut off."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "tests.jsonl")
        log.touch()
        with Path(folder, "output").open("w+") as output:
            run = subprocess.Popen(
                _command(context), cwd=ROOT, env=_environment(context, log), stdout=output, stderr=subprocess.STDOUT
            )
            yield from _follow(run, log, context)
            output.seek(0)
            last_words = output.read()[-2000:]
        if run.returncode not in (0, 1, None) and run.returncode > 0:
            yield {"case": "pytest", "verdict": "failed", "note": last_words}


def _follow(run: subprocess.Popen[bytes], log: Path, context: Context) -> Iterator[Row]:
    counts: dict[str, int] = {}
    with log.open() as lines:
        while True:
            ended = run.poll() is not None
            for line in lines:
                test = json.loads(line)
                counts[test["outcome"]] = counts.get(test["outcome"], 0) + 1
                if test["outcome"] == "failed":
                    yield {"case": test["test"], "verdict": "failed", "note": test["message"]}
            if ended or context.left() < SECONDS_TO_STOP:
                break
            time.sleep(0.2)
    cut_off = run.poll() is None
    if cut_off:
        run.kill()
        run.wait()
    said = ", ".join(f"{number} {outcome}" for outcome, number in sorted(counts.items())) or "no test ran"
    verdict = "failed" if counts.get("failed") or not counts.get("passed") else "cut off" if cut_off else "right"
    yield {"case": "tests/kernels", "contender": "ours", "verdict": verdict, "counts": counts, "note": said}


def _command(context: Context) -> list[str]:
    command = [sys.executable, "-m", "pytest", "-q", "--maxfail=50"]
    command += ["-p", "no:cacheprovider", "-p", "benchmarks.gpu.test_log"]
    if not context.smoke and find_spec("xdist") is not None:
        command += ["-n", str(WORKERS)]
    return [*command, *(SMOKE_TESTS if context.smoke else TESTS), "--device", context.device]


def _environment(context: Context, log: Path) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name != "PYTEST_XDIST_WORKER"}
    environment = {**inherited, test_log.VARIABLE: str(log)}  # whoever starts this, it is no worker's run
    if not context.smoke:
        environment["TRITON_INTERPRET"] = "0"
        # Without it cuBLAS refuses to run while uninitialised memory is made to show.
        environment["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    return environment
