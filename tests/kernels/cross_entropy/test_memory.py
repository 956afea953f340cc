"""Memory beyond inputs and gradients stays below one bound, whatever the vocabulary. Measured in fresh processes."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory from /proc")

MB = 1_000_000
LIMIT = 64
STEP = """
import psutil, sys, torch
from pathlib import Path
from llm2vec_fast.kernels.cross_entropy import linear_cross_entropy

def peak():
    status = Path("/proc/self/status").read_text()  # what getrusage says counts the parent process in
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

dtype, rows, vocabulary = getattr(torch, sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
trained, width, every = sys.argv[4] == "trained", int(sys.argv[5]), int(sys.argv[6])

def step(rows, vocabulary):
    hidden = torch.full((rows, width), 0.01, dtype=dtype, requires_grad=True)
    weight = torch.full((vocabulary, width), 0.01, dtype=dtype, requires_grad=trained)
    labels = torch.arange(rows) % vocabulary
    labels[torch.arange(rows) % every > 0] = -100
    before = psutil.Process().memory_info().rss
    linear_cross_entropy(hidden, weight, labels).backward()
    kept = sum(x.grad.nbytes for x in (hidden, weight) if x.grad is not None)
    return peak() - before - kept

step(100, 200)  # what the libraries keep for themselves
print(step(rows, vocabulary))
"""


@pytest.mark.parametrize("trained", ["trained", "frozen"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("rows", "vocabulary", "width", "every"), [(1200, 32000, 64, 1), (200, 262144, 64, 1), (2400, 32000, 768, 2)]
)
def test_extra_memory_is_bounded(rows, vocabulary, width, every, dtype, trained):
    """Of every so many rows one has a label."""
    command = [sys.executable, "-c", STEP, dtype, str(rows), str(vocabulary), trained, str(width), str(every)]
    extra = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) / MB
    logits = rows // every * vocabulary * (4 if dtype == "float32" else 2) / MB
    assert extra <= LIMIT < logits
