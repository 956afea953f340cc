"""The report keeps what it compiled: a second run compiles only what may come out differently."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks.codegen.report import Entry
from benchmarks.codegen.results import Results
from benchmarks.codegen.rows import Row

ROOT = Path(__file__).parents[3]
FAMILY, CHIP = "rotary", "gfx942"
MARK = 12345  # registers that no kernel has: a row that was taken over shows them


def _run(file, page, *more):
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "benchmarks.codegen", "--jobs", "1", "--family", FAMILY, "--arch", CHIP]
    run = subprocess.run(
        [*command, "--json", str(file), "--markdown", str(page), *more],
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


def test_a_file_holds_a_row_a_line_and_reads_back_the_same(tmp_path):
    file = tmp_path / "rows.json"
    product = Row("product", CHIP, 1.0, 64, 0, False, 0, 4, 2, "MFMA", 2, {"all": 500}, 500.0, "tensor", 1.0, 0.5)
    copy = Row("copy", CHIP, 1.0, 32, 0, False, 0, 4, 1, "", accesses=4, wide_accesses=3, wide_share=0.92)
    records = [{"family": FAMILY, "triton": "3.9.0", "digest": "of a source", **asdict(row)} for row in (product, copy)]
    file.write_text(json.dumps({"rows": records, "recorded": []}, indent=1))
    Results(file, []).save()
    lines = [line.rstrip(",") for line in file.read_text().splitlines() if line.startswith('{"')]
    assert [json.loads(line)["name"] for line in lines] == ["product", "copy"]
    assert "null" not in file.read_text()
    assert Results(file, []).entries() == [Entry(FAMILY, "3.9.0", "of a source", row) for row in (product, copy)]
