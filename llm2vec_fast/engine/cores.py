"""A core for each of many tasks, from threads that are made once and shared by all calls.

PyTorch's number of threads is a setting of each thread, but the last number set anywhere is also what threads yet to
come begin with. So the threads here are limited to one core once, when they are made, and that default is put back at
once: nothing that a caller could see changes, however many calls run side by side.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")
_AHEAD = 2  # tasks a core that a call has in the queue: none idles, and another call's come in between

_pools: dict[int, ThreadPoolExecutor] = {}
_lock = threading.Lock()
_forked = False


def each_on_a_core(function: Callable[[Item], Result], items: Sequence[Item], cores: int) -> Iterator[Result]:
    """Results in order, one item a core at a time; fewer items than cores run one after the other on all cores.

    Once it is closed, exhausted, or has raised, none of the items is running any more.
    """
    if cores == 1 or len(items) < cores:
        yield from map(function, items)
        return
    pool = _pool(cores)
    coming = iter(items)
    running: deque[Future[Result]] = deque(pool.submit(function, x) for x in islice(coming, _AHEAD * cores))
    try:
        while running:
            yield running[0].result()
            running.popleft()
            running.extend(pool.submit(function, x) for x in islice(coming, 1))
    finally:
        for future in running:
            future.cancel()
        wait(running)


def usable_threads() -> int:
    """PyTorch's number of threads here, which in a forked process becomes one.

    OpenMP's threads do not live on in such a process, and whatever would wait for them waits forever. So `DataLoader`
    limits its workers, too.
    """
    if _forked:
        torch.set_num_threads(1)
    return torch.get_num_threads()


def _pool(cores: int) -> ThreadPoolExecutor:
    """``cores`` threads that compute on one core each."""
    with _lock:
        if cores not in _pools:
            default = _in_new_thread(torch.get_num_threads)
            pool, everyone = ThreadPoolExecutor(cores, "embed"), threading.Barrier(cores)

            def begin() -> None:
                torch.get_num_threads()  # makes this thread take over the default, which it would at its first work
                torch.set_num_threads(1)
                everyone.wait()  # or one thread would take the task of another

            for started in [pool.submit(begin) for _ in range(cores)]:
                started.result()
            _in_new_thread(lambda: torch.set_num_threads(default))
            _pools[cores] = pool
        return _pools[cores]


def _in_new_thread(function: Callable[[], Result]) -> Result:
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(function).result()


def _after_fork() -> None:
    """A child process has none of these threads."""
    global _lock, _forked
    _pools.clear()
    _lock, _forked = threading.Lock(), True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
