"""One job a folder. The operating system drops the lock of a process that died, so no lock is ever stale."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llm2vec_fast.errors import JobRunningError, OutputError

LOCK = "lock"
HOLDER = "lock.json"


@contextmanager
def only_job(folder: Path, output: Path) -> Iterator[None]:
    """Hold ``folder`` for this process while it writes ``output``.

    Raises:
        JobRunningError: another process holds it; the message names it.
        OutputError: the folder cannot be written, or its file system has no locks.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise JobRunningError(
            f"another job ({_holder(folder)}) is writing {output}: wait for it, or give another --output"
        ) from error
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"{output} cannot be written ({folder / LOCK}: {reason}): give another --output") from error
    try:
        _write_holder(folder)
        yield
    finally:
        (folder / HOLDER).unlink(missing_ok=True)
        lock.release()


def _write_holder(folder: Path) -> None:
    """Who holds the lock, for the message of one who waits: a full disk does not end a job here."""
    holder = json.dumps({"pid": os.getpid(), "host": socket.gethostname()})
    try:
        (folder / HOLDER).write_text(holder, encoding="utf-8")
    except OSError:
        return


def _holder(folder: Path) -> str:
    try:
        holder = json.loads((folder / HOLDER).read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "its process is not known"
