"""The kernels compile for the GPUs they are made for, on a machine that has none, to code that passes the gate."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_the_main_configurations_pass_the_gate_on_every_architecture():
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "benchmarks.codegen", "--main"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    for instruction in ("mma.sync", "wgmma", "tcgen05.mma", "MFMA"):
        assert f"| {instruction} |" in run.stdout
