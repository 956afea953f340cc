"""The section that runs the kernels' tests tells which failed and why, also where it is cut off."""

from pathlib import Path

from benchmarks.gpu.section import Context
from benchmarks.gpu.sections import kernel_tests

ROOT = Path(__file__).parents[3]
TESTS = """
import time

def test_right():
    pass

def test_wrong():
    assert 1 + 1 == 3

def test_long():
    time.sleep({seconds})
"""


def _rows(tmp_path, monkeypatch, seconds, context):
    tmp_path.joinpath("conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    tmp_path.joinpath("test_made_up.py").write_text(TESTS.format(seconds=seconds))
    monkeypatch.setattr(kernel_tests, "SMOKE_TESTS", (str(tmp_path),))
    return kernel_tests.rows(context)


def test_a_failure_is_told_with_its_reason(tmp_path, monkeypatch):
    failure, last = _rows(tmp_path, monkeypatch, 0, Context(True, 90.0))
    assert failure["case"].endswith("test_wrong")
    assert (failure["verdict"], failure["note"]) == ("failed", "assert (1 + 1) == 3")
    assert (last["verdict"], last["counts"]) == ("failed", {"passed": 2, "failed": 1})


def test_what_ran_before_it_was_cut_off_is_kept(tmp_path, monkeypatch):
    context = Context(True, 90.0)
    rows = _rows(tmp_path, monkeypatch, 600, context)
    assert next(rows)["verdict"] == "failed"
    context.seconds = 0.0
    (last,) = rows
    assert last["counts"] == {"passed": 1, "failed": 1}
