"""A pytest plugin (`-p benchmarks.gpu.test_log`) that writes every outcome to a file at once, as JSON lines.

What a run that is cut off has found by then is not lost.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

VARIABLE = "LLM2VEC_FAST_TEST_LOG"


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """One line a test: its outcome, or what broke before or after it."""
    path = os.environ.get(VARIABLE)
    if not path or "PYTEST_XDIST_WORKER" in os.environ:  # the process that started the workers hears of all tests
        return
    if report.when != "call" and report.outcome == "passed":
        return
    crash = getattr(report.longrepr, "reprcrash", None)
    message = str(crash.message if crash else report.longrepr).splitlines()[0][:300] if report.failed else ""
    with Path(path).open("a") as log:
        log.write(json.dumps({"test": report.nodeid, "outcome": report.outcome, "message": message}) + "\n")
