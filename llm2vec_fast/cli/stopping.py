"""Ctrl-C and SIGTERM ask a job to stop; asked twice, the process ends at once. Either way finished parts are kept."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class Stop:
    """``event`` is set once a signal came; ``exit_code`` is 128 + the signal's number: 130 for Ctrl-C."""

    event: threading.Event = field(default_factory=threading.Event)
    exit_code: int = 0


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Catch SIGINT and SIGTERM in the block; the handlers that were there come back after it."""
    stop = Stop()

    def handle(number: int, frame: FrameType | None) -> None:
        stop.exit_code = 128 + number
        if stop.event.is_set():
            os._exit(stop.exit_code)
        stop.event.set()
        print("stopping after the batch at hand (once more: at once)", file=sys.stderr, flush=True)

    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
