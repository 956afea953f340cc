"""Memory beyond inputs and gradients stays below one bound, whatever the vocabulary and whatever the CPU multiplies.

Every machine has a CPU without bfloat16: oneDNN multiplies 16-bit matrices, and can be held to older instructions.
"""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory from /proc")

MB = 1_000_000
LIMIT = 64
# labelled rows, vocabulary, width, of how many rows one has a label, whether the weight is trained
CASES = [
    (1200, 32000, 64, 1, True),
    (200, 262144, 64, 1, True),
    (200, 262144, 64, 1, False),
    (1200, 32000, 768, 2, True),
    (1200, 32000, 768, 2, False),
]
# Every step in a process of its own, forked where the libraries are loaded and nothing has run: no memory that an
# earlier one gave back hides what a later one takes.
STEPS = """
import json, os, psutil, sys, torch
from pathlib import Path
from llm2vec_fast.kernels.cross_entropy import linear_cross_entropy

dtype, cases = getattr(torch, sys.argv[1]), json.loads(sys.argv[2])

def peak():
    status = Path("/proc/self/status").read_text()  # what getrusage says counts the parent process in
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

def step(labelled, vocabulary, width, every, trained):
    rows = labelled * every
    hidden = torch.full((rows, width), 0.01, dtype=dtype, requires_grad=True)
    weight = torch.full((vocabulary, width), 0.01, dtype=dtype, requires_grad=trained)
    labels = torch.arange(rows) % vocabulary
    labels[torch.arange(rows) % every > 0] = -100
    before = psutil.Process().memory_info().rss
    linear_cross_entropy(hidden, weight, labels).backward()
    kept = sum(x.grad.nbytes for x in (hidden, weight) if x.grad is not None)
    return peak() - before - kept

for case in cases:
    child = os.fork()
    if child == 0:
        step(100, 200, *case[2:])  # what the libraries keep for themselves
        print(step(*case), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.parametrize(
    ("dtype", "instructions"),
    [("float32", ""), ("bfloat16", ""), ("bfloat16", "AVX2"), ("float16", "AVX2")],
)
def test_extra_memory_is_bounded(dtype, instructions):
    command = [sys.executable, "-c", STEPS, dtype, json.dumps(CASES)]
    env = {**os.environ, "ONEDNN_MAX_CPU_ISA": instructions} if instructions else None
    lines = subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout.splitlines()
    for case, extra in zip(CASES, lines, strict=True):
        logits = case[0] * case[1] * (4 if dtype == "float32" else 2) / MB
        assert int(extra) / MB <= LIMIT < logits, case
