"""Sections come and go: what one has found is kept when it hangs, crashes, or has nothing to measure."""

import json
import os
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from benchmarks.gpu.runner import clean, run
from benchmarks.gpu.section import NotAvailableError


class Fake(NamedTuple):
    """A section of the test's own."""

    name: str
    seconds: float
    rows: object


def good(context):
    yield {"case": "a", "peak": "matmul TFLOP/s", "rate": 5.0, "unit": "TFLOP/s", "ms": 1.0}


def hanging(context):
    yield {"case": "before", "verdict": "right"}
    time.sleep(60)


def crashing(context):
    yield {"case": "before", "verdict": "right"}
    os._exit(7)


def raising(context):
    yield {"case": "before", "verdict": "right"}
    raise RuntimeError("illegal memory access")


def missing(context):
    yield from ()
    raise NotAvailableError("there is no such kernel")


def told(context):
    yield {"case": "peaks", "peaks": dict(context.peaks)}


def ours_wrong(context):
    yield {"case": "a", "contender": "ours, Triton", "verdict": "wrong"}


def peer_wrong(context):
    yield {"case": "a", "contender": "cuDNN", "verdict": "wrong"}


def _run(tmp_path, *sections, seconds=30.0):
    path = tmp_path / "found.json"
    found = run(sections, True, seconds, path, say=lambda _: None)
    assert json.loads(path.read_text()) == found
    return found


@pytest.mark.parametrize(
    ("rows", "status", "reason", "kept"),
    [
        (good, "done", "", 1),
        (hanging, "cut off", "its 2 s were over", 1),
        (crashing, "failed", "exit code 7", 1),
        (raising, "failed", "RuntimeError: illegal memory access", 1),
        (missing, "not available", "there is no such kernel", 0),
    ],
)
def test_a_section_keeps_what_it_found(tmp_path, rows, status, reason, kept):
    found = _run(tmp_path, Fake("one", 2.0, rows), Fake("two", 2.0, good))
    one = found["sections"]["one"]
    assert one["status"] == status
    assert reason in one["reason"]
    assert len(one["rows"]) == kept
    assert found["sections"]["two"]["status"] == "done"
    assert clean(found) == (status in ("done", "not available"))


def test_what_is_left_when_the_time_is_over_is_not_run(tmp_path):
    began = time.monotonic()
    found = _run(tmp_path, Fake("one", 60.0, hanging), Fake("two", 60.0, good), seconds=2.5)
    assert time.monotonic() - began < 20
    assert found["sections"]["one"]["status"] == "cut off"
    assert found["sections"]["two"] == {"status": "not run", "reason": "no time left", "rows": []}


def test_peaks_reach_the_sections_after_them(tmp_path):
    found = _run(tmp_path, Fake("peaks", 5.0, good), Fake("next", 5.0, told))
    assert found["sections"]["next"]["rows"][0]["peaks"] == {"matmul TFLOP/s": 5.0}


def test_a_wrong_answer_of_ours_is_not_clean(tmp_path):
    assert not clean(_run(tmp_path, Fake("one", 5.0, ours_wrong)))
    assert clean(_run(tmp_path, Fake("one", 5.0, peer_wrong)))


def test_what_a_section_started_ends_with_it(tmp_path):
    def starting(context):
        pid = os.fork()
        if pid == 0:
            time.sleep(60)
            os._exit(0)
        yield {"case": str(pid)}
        time.sleep(60)

    found = _run(tmp_path, Fake("one", 1.5, starting))
    pid = int(found["sections"]["one"]["rows"][0]["case"])
    time.sleep(0.5)
    status = Path(f"/proc/{pid}/status")
    assert not status.exists() or "\nState:\tZ" in status.read_text()
