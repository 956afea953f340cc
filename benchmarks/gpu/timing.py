"""Times on a GPU: device events, medians, the level-2 cache flushed before every run, clocks left as they are."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

FLUSH_BYTES = 256 * 2**20  # several times the level-2 cache of any GPU so far
# Before each run the device idles for so many clocks (half a millisecond or so), in which the host enqueues the run:
# what is timed is the device, not Python. Work of many launches is bound by the host all the same, as in real use.
HEAD_START = 1_000_000
MEASURED_MS = 120.0
LEAST_RUNS, MOST_RUNS = 7, 50


class Clock:
    """Median milliseconds on the device; without one (``smoke``) it runs the work once and has no time to tell."""

    def __init__(self, smoke: bool) -> None:
        self._flushed = None if smoke else torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def milliseconds(self, work: Callable[[], object]) -> float | None:
        """The median of several runs of ``work``, after two to warm up."""
        work()
        if self._flushed is None:
            return None
        runs = int(MEASURED_MS / max(self._timed(work, 1)[0], 1e-3))
        return statistics.median(self._timed(work, min(max(runs, LEAST_RUNS), MOST_RUNS)))

    def _timed(self, work: Callable[[], object], runs: int) -> list[float]:
        pairs = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(runs)]
        for start, end in pairs:
            self._flushed.zero_()
            torch.cuda._sleep(HEAD_START)
            start.record()
            work()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in pairs]


def peak_extra_mib(work: Callable[[], object], smoke: bool) -> float | None:
    """The most memory that ``work`` held on the device at once beyond what was there before, in MiB."""
    if smoke:
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20
