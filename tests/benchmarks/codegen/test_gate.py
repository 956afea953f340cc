"""The kernels compile for the GPUs they are made for, on a machine that has none, to code that passes the gate."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.codegen.variants import families

ROOT = Path(__file__).parents[3]


def _report(*arguments):
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "benchmarks.codegen", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("family", families())
def test_the_main_configurations_pass_the_gate_on_every_architecture(family):
    run = _report("--main", "--family", family)
    assert run.returncode == 0, run.stdout + run.stderr
    for architecture in ("sm_80", "sm_90", "sm_100", "gfx942"):
        assert f"| {architecture} |" in run.stdout
