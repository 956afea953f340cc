"""Processes that train, each forked from one that has imported all of it: an import takes longer than a short run.

`WarmProcesses.start` is to a test what `subprocess.Popen` and torchrun are: processes of their own, joined by gloo.
This file run as a program is the one that forks; it takes a JSON object a line, and answers each with a line.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

IMPORTED = (
    *("torch.distributed.fsdp", "transformers.trainer", "accelerate", "datasets", "peft", "llm2vec_fast.cli.train"),
    *(f"llm2vec_fast.training.{stage}" for stage in ("config", "mntp", "simcse", "contrastive", "word_level")),
)
ENDS_WITHIN = 60  # seconds that the other ranks have to end by themselves once one has failed


class WarmProcesses:
    """The process that forks, begun at first use."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[str] | None = None

    def start(self, program: list[str], processes: int, folder: Path) -> Ranks:
        """Run ``python PROGRAM``, as so many ranks of one group; what they print goes to files in ``folder``."""
        group = _of_group(processes)
        ranks = [{**group, "RANK": str(i), "LOCAL_RANK": str(i)} for i in range(processes)] if processes > 1 else [{}]
        outputs = [str(folder / f"{name}-{time.monotonic_ns()}") for name in ("stdout", "stderr")]
        pids = self.ask({"program": program, "ranks": ranks, "outputs": outputs, "folder": os.getcwd()})
        return Ranks(self, pids, *map(Path, outputs))

    def ask(self, question: Any) -> Any:
        """The answer of the process that forks."""
        if self._server is None:
            command, environment = [sys.executable, __file__], {**os.environ, "OMP_NUM_THREADS": "1"}
            self._server = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
            )
        print(json.dumps(question), file=self._server.stdin, flush=True)
        return json.loads(self._server.stdout.readline())

    def close(self) -> None:
        """End it."""
        if self._server is not None:
            self._server.stdin.close()
            self._server.wait(60)


class Ranks:
    """Processes under way, with the names of `subprocess.Popen`; ``pid`` is the first one's."""

    def __init__(self, owner: WarmProcesses, pids: list[int], stdout: Path, stderr: Path) -> None:
        self._owner, self._pids, self._outputs = owner, pids, (stdout, stderr)
        self.pid, self.returncode = pids[0], None

    def poll(self) -> int | None:
        """The exit code once all have ended: the first that is not 0."""
        if self.returncode is None:
            codes = self._owner.ask({"codes": self._pids})
            if None not in codes:
                self.returncode = next((code for code in codes if code), 0)
        return self.returncode

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """Wait; what they printed, and what they said on stderr. All are killed where it takes longer."""
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                self.kill()
                raise subprocess.TimeoutExpired("ranks", timeout)
            if any(self._owner.ask({"codes": self._pids})):
                end = min(end, time.monotonic() + ENDS_WITHIN)
            time.sleep(0.02)
        stdout, stderr = (path.read_text(errors="replace") for path in self._outputs)
        return stdout, stderr

    def kill(self) -> None:
        """End them all."""
        for pid, code in zip(self._pids, self._owner.ask({"codes": self._pids}), strict=True):
            if code is None:
                os.kill(pid, signal.SIGKILL)


def _of_group(processes: int) -> dict[str, str]:
    """What torchrun tells each of its processes."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    sizes = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    return {**sizes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _serve() -> None:
    for name in IMPORTED:
        import_module(name)
    codes: dict[int, int] = {}
    for line in sys.stdin:
        question = json.loads(line)
        if "codes" in question:
            answer: list[int | None] = [_code(pid, codes) for pid in question["codes"]]
        else:
            answer = [_fork(question, rank) for rank in question["ranks"]]
        print(json.dumps(answer), flush=True)


def _code(pid: int, codes: dict[int, int]) -> int | None:
    if pid not in codes:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if not ended:
            return None
        codes[pid] = os.waitstatus_to_exitcode(status)
    return codes[pid]


def _fork(job: dict[str, Any], rank: dict[str, str]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        for stream, path in zip((1, 2), job["outputs"], strict=True):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(job["folder"])
        os.environ.update(rank)
        code = _run(job["program"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run(program: list[str]) -> int:
    """Python's own command line: ``-m MODULE …`` or ``FILE …``."""
    is_module = program[0] == "-m"
    sys.argv = program[1:] if is_module else program
    try:
        (runpy.run_module if is_module else runpy.run_path)(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


if __name__ == "__main__":
    del sys.path[0]  # tests/ has a folder llm2vec_fast, too
    _serve()
