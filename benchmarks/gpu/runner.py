"""Runs the sections one after the other, each in a process of its own, and writes down what they find as they find it.

A section that crashes, hangs or breaks the device's context loses its own rows still to come, and nothing else.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.gpu.section import Context, NotAvailableError, Row, Section
from benchmarks.report import machine, write_json

SMOKE_NOTE = "Smoke run on a CPU: tiny shapes, Triton's interpreter. It shows that the suite runs; it holds no time."
GPU_NOTE = "Times are medians of device events; rates count the work that had to be done, whatever was done."
SECONDS_TO_LEAVE = 5.0


def run(
    sections: Sequence[Section], smoke: bool, seconds: float, write_to: Path | None, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Everything found, also written to ``write_to`` after every row; sections past ``seconds`` in all are not run."""
    for package in ("torch", "triton"):  # once for all sections; importing them leaves the device alone
        with contextlib.suppress(ImportError):
            import_module(package)
    found: dict[str, Any] = {"smoke": smoke, "note": SMOKE_NOTE if smoke else GPU_NOTE, "machine": machine()}
    found["sections"] = {}
    say(found["note"])
    ends = time.monotonic() + seconds
    peaks: dict[str, float] = {}
    for section in sections:
        left = min(section.seconds, ends - time.monotonic())
        entry: dict[str, Any] = {"status": "not run", "reason": "no time left", "rows": []}
        found["sections"][section.name] = entry
        say(f"\n{section.name}")
        if left > 1:
            _run_section(section, Context(smoke, left, peaks), entry, lambda: _write(found, write_to), say)
        say(f"  {entry['status']}" + (f": {entry['reason']}" if entry["reason"] else ""))
        for row in entry["rows"]:
            if row.get("rate") is not None and "peak" in row:
                peaks[row["peak"]] = row["rate"]
        _write(found, write_to)
    return found


def clean(found: dict[str, Any]) -> bool:
    """Nothing of ours wrong, failed or cut off: what is not available here is no fault, nor is a peer's error."""
    fine = all(entry["status"] in ("done", "not available") for entry in found["sections"].values())
    rows = [row for entry in found["sections"].values() for row in entry["rows"]]
    return fine and not any(_ours_is_at_fault(row) for row in rows)


def _ours_is_at_fault(row: Row) -> bool:
    wrong = row.get("verdict") == "wrong" and row.get("contender", "").startswith("ours")
    return wrong or row.get("verdict") in ("failed", "cut off")


def line(row: Row) -> str:
    """A row, for a person."""
    words = [str(row.get("case", "")), str(row.get("contender", "")), row.get("pass", ""), row.get("verdict", "")]
    if row.get("ms") is not None:
        words.append(f"{row['ms']:.3f} ms")
    if row.get("rate") is not None:
        words.append(f"{row['rate']:.0f} {row['unit']}")
    if row.get("of peak") is not None:
        words.append(f"{row['of peak']:.0%} of peak")
    return "  " + " | ".join(word for word in (*words, row.get("note", "")) if word)


def _run_section(
    section: Section, context: Context, entry: dict[str, Any], write: Callable[[], None], say: Callable[[str], None]
) -> None:
    # Forked: PyTorch need not be imported again, and since the parent never touches the device, the child may.
    processes = multiprocessing.get_context("fork")
    receiver, sender = processes.Pipe(duplex=False)
    process = processes.Process(target=_child, args=(section, context, sender))
    process.start()
    sender.close()
    entry["status"], entry["reason"] = "cut off", f"its {context.seconds:.0f} s were over"
    try:
        while context.left() > 0 and receiver.poll(context.left()):
            kind, content = receiver.recv()
            if kind == "row":
                entry["rows"].append(content)
                say(line(content))
                write()
            else:
                entry["status"], entry["reason"] = content
                break
    except EOFError:
        process.join()
        entry["status"], entry["reason"] = "failed", f"its process ended with exit code {process.exitcode}"
    finally:
        if entry["status"] != "cut off":
            process.join(timeout=SECONDS_TO_LEAVE)
        _end(process)


def _child(section: Section, context: Context, sender: Connection) -> None:
    os.setsid()  # what it starts in turn ends with it
    try:
        for row in section.rows(context):
            sender.send(("row", row))
        sender.send(("end", ("done", "")))
    except NotAvailableError as reason:
        sender.send(("end", ("not available", str(reason))))
    except BaseException as error:
        traceback.print_exc()
        sender.send(("end", ("failed", f"{type(error).__name__}: {error}")))


def _end(process: multiprocessing.process.BaseProcess) -> None:
    """Leave nothing of it running."""
    for signalled in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError):
            signalled(process.pid, signal.SIGKILL)
    process.join()


def _write(found: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        write_json(path, found)
