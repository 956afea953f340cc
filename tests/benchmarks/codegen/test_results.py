"""The report keeps what it compiled: a second run compiles only what may come out differently."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
FAMILY, CHIP = "rotary", "gfx942"
MARK = 12345  # registers that no kernel has: a row that was taken over shows them


def _run(file, page, *more):
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "benchmarks.codegen", "--family", FAMILY, "--arch", CHIP, "--json", str(file)]
    run = subprocess.run(
        [*command, "--markdown", str(page), *more],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.stdout.startswith("Triton "), run.stderr  # the gate is not what is tested here
    return json.loads(file.read_text())["rows"]


@pytest.fixture
def files(tmp_path):
    return tmp_path / "rows.json", tmp_path / "page.md"


def test_only_what_may_come_out_differently_is_compiled_again(files):
    rows = _run(*files)
    assert rows
    assert all(row["family"] == FAMILY and row["architecture"] == CHIP for row in rows)
    taken_over, changed, *_ = (dict(row, registers=MARK) for row in rows)
    changed["digest"] = "of another source"
    vanished, older = dict(rows[0], name="no longer there"), dict(rows[0], triton="1.0.0", registers=MARK)
    files[0].write_text(json.dumps({"rows": [taken_over, changed, *rows[2:], vanished, older]}))
    again = _run(*files)
    assert again == [taken_over, rows[1] | {"compile_seconds": again[1]["compile_seconds"]}, *rows[2:], older]
    page = files[1].read_text()
    assert page.count(f"| {MARK} |") == 2
    assert page.index(f"Compiled by Triton {rows[0]['triton']}") < page.index("Compiled by Triton 1.0.0")
    afresh = _run(*files, "--again", "--only", rows[0]["name"])
    assert afresh[0]["registers"] == rows[0]["registers"]
    assert afresh[1:] == again[1:]
