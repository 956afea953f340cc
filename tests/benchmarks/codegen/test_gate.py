"""The kernels compile for the GPUs they are made for, on a machine that has none, to code that passes the gate.

What `make codegen` has kept is taken over; what would come out otherwise, since a kernel or the compiler changed, is
compiled here.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.codegen.compiling import TARGETS
from benchmarks.codegen.variants import families

ROOT = Path(__file__).parents[3]
KEPT = ROOT / "benchmarks" / "results" / "codegen.json"
AFRESH = ("attention", "attention-forward-D64-bfloat16")


def _report(*arguments):
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "benchmarks.codegen", "--jobs", "1", "--main", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=800)


def _rows(path):
    """Figures by kernel, chip, release of Triton and digest, without the time that compiling took."""
    rows = json.loads(path.read_text())["rows"]
    named = ("name", "architecture", "triton", "digest")
    return {tuple(row.pop(x) for x in named): row | {"compile_seconds": None} for row in rows}


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return Path(shutil.copy(KEPT, tmp_path_factory.mktemp("codegen")))


def test_the_main_configurations_pass_the_gate_on_every_architecture(kept):
    run = _report("--json", str(kept))
    assert run.returncode == 0, run.stdout + run.stderr
    compiled = {(row["family"], key[1]) for key, row in _rows(kept).items()}
    for family in families():
        for architecture in TARGETS:
            assert (family, architecture) in compiled
            assert f"| {architecture} |" in run.stdout


def test_what_was_kept_is_what_comes_out(tmp_path):
    """Of one kernel with every kind of figure, on every chip."""
    family, name = AFRESH
    run = _report("--json", str(tmp_path / "rows.json"), "--family", family, "--only", name)
    assert run.returncode == 0, run.stdout + run.stderr
    kept, fresh = _rows(KEPT), _rows(tmp_path / "rows.json")
    assert {key[1] for key in fresh} == set(TARGETS)
    assert all(row == kept.get(key, row) for key, row in fresh.items())  # of another compiler there may be none
