"""How one process of several ends."""

from __future__ import annotations

import atexit
import os
import sys


def leave_group(code: object) -> None:
    """Where processes train together, end this one with an exit code; alone, do nothing.

    Python is not taken down: a thread of gloo's may still be about to free what ran in the last backward pass, and
    needs the interpreter for it. It waits for an interpreter that waits for it, or finds none and aborts the process
    when all is written (torch 2.8 to 2.13; 3 of 20 runs of two processes that use DistributedDataParallel and end).
    """
    if not _in_group():
        return
    atexit._run_exitfuncs()  # trackers finish here
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def _in_group() -> bool:
    if "torch" not in sys.modules:  # most verbs begin without it
        return False
    from torch import distributed

    return distributed.is_available() and distributed.is_initialized()
