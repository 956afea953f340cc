"""The GPU suite runs from end to end on a machine without a GPU, and says that it measured nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
FIGURES = ("ms", "rate", "of peak", "peak extra MiB")


def test_the_suite_runs_from_end_to_end(tmp_path):
    """One test: a run takes longer than all that is looked at."""
    path = tmp_path / "smoke.json"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "benchmarks/gpu_suite.py", "--smoke", "--output", str(path)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    found = json.loads(path.read_text())
    assert_every_section_runs_or_says_what_is_missing(run, found)
    assert_outputs_and_gradients_were_compared_and_right(found)
    assert_no_time_of_a_cpu_is_given_as_one_of_a_gpu(run, found)


def _rows(found):
    return [row for section in found["sections"].values() for row in section["rows"]]


def assert_every_section_runs_or_says_what_is_missing(run, found):
    assert run.returncode == 0, run.stdout + run.stderr
    for name, section in found["sections"].items():
        assert section["status"] in ("done", "not available"), (name, section)
        assert bool(section["reason"]) == (section["status"] == "not available")
    for name in ("peaks", "kernel_tests", "attention", "sweep"):
        assert found["sections"][name]["status"] == "done"


def assert_outputs_and_gradients_were_compared_and_right(found):
    rows = _rows(found)
    assert not [row for row in rows if row.get("verdict") in ("wrong", "failed", "cut off", "out of memory")]
    right = {(row["contender"], row.get("pass")) for row in rows if row.get("verdict") == "right"}
    for contender in ("ours, Triton", "SDPA, padded", "SDPA a sequence"):
        assert {(contender, "forward"), (contender, "backward")} <= right
    tests = found["sections"]["kernel_tests"]["rows"][-1]
    assert tests["verdict"] == "right"
    assert tests["counts"]["passed"] > 0


def assert_no_time_of_a_cpu_is_given_as_one_of_a_gpu(run, found):
    assert found["smoke"] is True
    for text in (found["note"], run.stdout):
        assert "it holds no time" in text
    assert all(row.get(figure) is None for row in _rows(found) for figure in FIGURES)
    assert " ms" not in run.stdout
    assert "FLOP/s" not in run.stdout
    assert "B/s" not in run.stdout


def test_without_a_gpu_and_without_smoke_it_says_what_to_do(tmp_path):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "benchmarks.gpu_suite", "--output", str(tmp_path / "gpu.json")]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 2
    assert "--smoke" in run.stderr
    assert not (tmp_path / "gpu.json").exists()
