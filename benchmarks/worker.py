"""A contender in a process of its own: built once, then run when its turn comes."""

from __future__ import annotations

import contextlib
import multiprocessing
import re
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

Contender = Callable[[str, list[str]], Callable[[], np.ndarray]]


class Worker:
    """Builds ``contender(folder, texts)`` in a fresh process and runs it on request; idle otherwise."""

    def __init__(self, contender: Contender, folder: str, texts: list[str]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, contender, folder, texts), daemon=True)
        self._process.start()
        theirs.close()  # or nobody would notice that the process has ended
        self.loaded_mib: float = self._answer()

    def outputs(self) -> np.ndarray:
        """Run once and return the result."""
        return self._ask("outputs")

    def seconds(self) -> float:
        """Run once and return the wall time."""
        return self._ask("seconds")

    def peak_mib(self) -> float:
        """The process's largest resident size so far, everything included, in MiB."""
        return self._ask("peak")

    def stop(self) -> None:
        self._pipe.send("stop")
        self._process.join()

    def _ask(self, question: str) -> np.ndarray | float:
        self._pipe.send(question)
        return self._answer()

    def _answer(self) -> np.ndarray | float:
        try:
            return self._pipe.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"a contender ended with exit code {self._process.exitcode}: see above") from None


def _serve(pipe: Connection, contender: Contender, folder: str, texts: list[str]) -> None:
    run = contender(folder, texts)
    pipe.send(_peak_mib())
    while (question := pipe.recv()) != "stop":
        if question == "peak":
            pipe.send(_peak_mib())
            continue
        before = time.perf_counter()
        result = run()
        pipe.send(result if question == "outputs" else time.perf_counter() - before)


def forget_peak() -> None:
    """From here on this process's peak is that of running: reading a model may have taken more for a moment."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_mib() -> float:
    """From /proc where there is one: getrusage counts what the parent held when it started this process, too."""
    status = Path("/proc/self/status")
    if not status.exists():
        import resource  # which Windows lacks

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 1024
