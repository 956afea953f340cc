"""A real process is killed, interrupted, short of disk or given a large corpus, and the job takes no harm."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from folders import errors, manifest, parts

from llm2vec_fast.bulk.verify import verify

TESTS = Path(__file__).parents[2]
COMMAND = [sys.executable, "-c", "import fake_encoder; fake_encoder.run_command_line()"]
PATIENCE_SECONDS = 300


def environment(**extra: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]), **extra}


@pytest.fixture
def arguments(tmp_path: Path, model: Path) -> Callable[[str], list[str]]:
    """The arguments that embed 3,000 lines, some of them empty, into a folder of the name given."""
    path = tmp_path / "lines.txt"
    path.write_text("".join("\n" if row % 50 == 0 else f"text number {row}\n" for row in range(3000)))
    return lambda output: [
        *("embed", str(path), "--model", str(model), "--output", str(tmp_path / output)),
        *("--rows-per-shard", "100", "--keep-columns", "text"),
    ]


def finish(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], env=environment(), capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )


def start_slowly(arguments: list[str]) -> subprocess.Popen[str]:
    """A job of 30 parts that takes 3 seconds at least."""
    slow = environment(FAKE_ROWS="10", FAKE_DELAY="0.01")
    return subprocess.Popen([*COMMAND, *arguments], env=slow, stderr=subprocess.PIPE, text=True)


def wait_for_parts(folder: Path, count: int) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while len(list(folder.glob("part-*.parquet"))) < count:
        assert time.monotonic() < deadline, f"fewer than {count} parts in {PATIENCE_SECONDS} s"
        time.sleep(0.005)


def test_a_job_killed_again_and_again_ends_with_the_same_bits(
    arguments: Callable[[str], list[str]], tmp_path: Path
) -> None:
    assert finish(arguments("straight")).returncode == 0
    for count in (1, 9, 17):
        process = start_slowly(arguments("out"))
        wait_for_parts(tmp_path / "out", count)
        process.send_signal(signal.SIGKILL)
        assert process.wait(PATIENCE_SECONDS) == -signal.SIGKILL
        assert len(parts(tmp_path / "out")) < 30, "the job ended before it was killed"
        assert not verify(tmp_path / "out").faults
    done = len(parts(tmp_path / "out"))
    last = finish(arguments("out"))
    assert last.returncode == 0, last.stderr
    assert f"going on after {done}" in last.stderr or f"going on after {done - 1}" in last.stderr
    assert parts(tmp_path / "out") == parts(tmp_path / "straight")
    assert errors(tmp_path / "out") == errors(tmp_path / "straight")
    assert manifest(tmp_path / "out")["parts"] == manifest(tmp_path / "straight")["parts"]
    assert verify(tmp_path / "out").finished
    assert not list((tmp_path / "out").rglob("*.tmp"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "sigterm"])
def test_a_job_told_to_stop_says_how_to_go_on(
    arguments: Callable[[str], list[str]], tmp_path: Path, number: signal.Signals, code: int
) -> None:
    assert finish(arguments("straight")).returncode == 0
    process = start_slowly(arguments("out"))
    wait_for_parts(tmp_path / "out", 3)
    process.send_signal(number)
    _, said = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == code
    kept = len(manifest(tmp_path / "out")["parts"])
    assert 3 <= kept == len(parts(tmp_path / "out")) < 30
    assert f"stopped: {kept} finished parts" in said
    assert "the same command goes on:\n  llm2vec-fast embed " in said
    assert "Traceback" not in said
    assert finish(arguments("out")).returncode == 0
    assert parts(tmp_path / "out") == parts(tmp_path / "straight")


def test_a_limit_on_file_size_is_reported_as_a_full_disk(arguments: Callable[[str], list[str]], tmp_path: Path) -> None:
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000)); "
    command = [COMMAND[0], "-c", limited + COMMAND[2], *arguments("out")]
    process = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert process.returncode == 1
    [sentence] = [line for line in process.stderr.splitlines() if line.startswith("llm2vec-fast: ")]
    assert "no space left to write part-00000.parquet" in sentence
    assert "Traceback" not in process.stderr
    assert finish(arguments("out")).returncode == 0


# VmHWM is the peak of this program alone; ru_maxrss starts at that of the process that forked it
MEASURE = """
import fake_encoder
try:
    fake_encoder.run_command_line()
finally:
    print("peak", next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def peak_kilobytes(arguments: list[str]) -> int:
    process = subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments],
        env=environment(FAKE_ROWS="4096"),
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    assert process.returncode == 0, process.stderr
    return int(process.stdout.split("peak ")[1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, model: Path) -> None:
    peaks = {}
    for rows in (100_000, 1_000_000):
        path = tmp_path / f"{rows}.txt"
        with open(path, "w") as file:
            file.writelines(f"row {row}\n" for row in range(rows))
        peaks[rows] = peak_kilobytes(["embed", str(path), "-m", str(model), "-o", str(tmp_path / f"out{rows}")])
    # ten times the rows, 90 MB more of texts, ids and embeddings in Python objects: a quarter of them would show
    assert peaks[1_000_000] - peaks[100_000] < 20_000, peaks
