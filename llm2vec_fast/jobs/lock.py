"""One job a folder. The operating system drops the lock of a process that died, so no lock is ever stale."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llm2vec_fast.errors import JobRunningError

LOCK = "lock"
HOLDER = "lock.json"


@contextmanager
def only_job(folder: Path) -> Iterator[None]:
    """Hold ``folder`` for this process.

    Raises:
        JobRunningError: another process holds it; the message names it.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise JobRunningError(
            f"another job ({_holder(folder)}) is writing {folder.parent}: wait for it, or give another --output"
        ) from error
    try:
        (folder / HOLDER).write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        yield
    finally:
        (folder / HOLDER).unlink(missing_ok=True)
        lock.release()


def _holder(folder: Path) -> str:
    try:
        holder = json.loads((folder / HOLDER).read_text())
        return f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, KeyError):
        return "its process is not known"
