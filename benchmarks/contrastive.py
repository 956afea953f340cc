"""The in-batch contrastive loss, forward and backward: ours against the whole matrix and sentence-transformers' cache.

    python -m benchmarks.contrastive     # prints the table and the crossover, writes results/contrastive.json

Every contender runs in a process of its own, and they take turns. Losses and gradients are compared before anything is
timed. Memory is the peak of resident memory in the step, less what was there before it and the gradients it leaves.
The whole takes about a quarter of an hour: for that not every contender enters every case, and slow ones have one turn.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.report import machine, markdown_table, update_readme, write_json
from llm2vec_fast.kernels.contrastive import WHOLE_BYTES

RESULTS = Path(__file__).parent / "results" / "contrastive.json"
README_ROWS = "contrastive"
SCALE = 20.0
SLOW = 1.0  # seconds; a turn that takes longer is not repeated
QUICK = 0.02  # seconds; a shorter step is repeated within a turn
MIB = 1024 * 1024
# Losses and gradients of two contenders may differ by roundings of the dtype, not more.
AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Case:
    """A batch of as many documents as queries."""

    rows: int
    width: int
    dtype: str = "float32"

    def __str__(self) -> str:
        return f"{self.dtype}, N {self.rows}, d {self.width}"


def ours(queries: Tensor, documents: Tensor) -> Tensor:
    from llm2vec_fast.kernels import contrastive_loss

    return contrastive_loss(queries, documents, scale=SCALE)


def tiles(queries: Tensor, documents: Tensor) -> Tensor:
    """Ours, whatever the batch."""
    from llm2vec_fast.kernels import contrastive_loss

    return contrastive_loss(queries, documents, scale=SCALE, backend="blocked")


def at_once(queries: Tensor, documents: Tensor) -> Tensor:
    """Ours with the whole matrix, whatever the batch."""
    from llm2vec_fast.kernels import contrastive

    with mock.patch.dict(contrastive.WHOLE_BYTES, plain=2**63):
        return contrastive.contrastive_loss(queries, documents, scale=SCALE)


def whole(queries: Tensor, documents: Tensor) -> Tensor:
    """What most training scripts do: one product, one cross-entropy."""
    scores = F.normalize(queries, dim=1) @ F.normalize(documents, dim=1).T
    return F.cross_entropy(scores.float() * SCALE, torch.arange(scores.shape[0]))


def sentence_transformers(queries: Tensor, documents: Tensor) -> Tensor:
    """The second of the three steps of CachedMultipleNegativesRankingLoss, with its own batches of 32: its backward
    pass has run when it returns."""
    from sentence_transformers.losses import CachedMultipleNegativesRankingLoss

    loss = CachedMultipleNegativesRankingLoss(nn.Sequential(nn.Identity()), scale=SCALE)
    return loss.calculate_loss([[queries], [documents]], with_backward=True)


OURS, AT_ONCE, TILES = "ours", "ours, always at once", "ours, always in tiles"
WHOLE, CACHED = "GEMM + cross-entropy", "sentence-transformers, cached"
CONTENDERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    OURS: ours,
    AT_ONCE: at_once,
    TILES: tiles,
    WHOLE: whole,
    CACHED: sentence_transformers,
}
CASES = [
    *(Case(rows, 384) for rows in (64, 256, 1024, 2048, 4096, 8192, 65536)),
    *(Case(rows, 768) for rows in (64, 1024, 2048, 4096, 65536)),
    *(Case(rows, 4096) for rows in (64, 1024, 2048, 4096, 65536)),
    *(Case(rows, 768, "bfloat16") for rows in (64, 256, 1024, 2048, 4096)),
]


def contenders(case: Case) -> list[str]:
    """Who enters a case: of the largest batch, the whole matrix alone would take 16 GiB, and its gradient as much."""
    if case.rows > 16384:
        return [OURS]
    return [OURS, AT_ONCE, TILES, WHOLE, CACHED] if case.rows <= 2048 else [OURS, AT_ONCE, TILES, WHOLE]


class Process:
    """A contender in a process of its own."""

    def __init__(self, name: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, name), daemon=True)
        self._process.start()

    def ask(self, question: Any) -> Any:
        """(case, whether to compare): prepare it, return loss and samples of the gradients; "step": seconds and extra
        MiB of one; None: end."""
        self._pipe.send(question)
        return self._pipe.recv() if question is not None else self._process.join()


def _serve(pipe: Connection, name: str) -> None:
    function = CONTENDERS[name]
    inputs: tuple[Tensor, Tensor] | None = None
    while (question := pipe.recv()) is not None:
        if question == "step":
            pipe.send(_step(function, inputs))
        else:
            case, compare = question
            inputs = None
            inputs = _inputs(case)
            pipe.send(_samples(function, inputs) if compare else None)


def _inputs(case: Case) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    documents = torch.randn(case.rows, case.width, generator=generator)
    queries = documents + 3 * torch.randn(case.rows, case.width, generator=generator)
    dtype = getattr(torch, case.dtype)
    return queries.to(dtype).requires_grad_(), documents.to(dtype).requires_grad_()


def _run(function: Callable[..., Tensor], inputs: tuple[Tensor, Tensor]) -> Tensor:
    for x in inputs:
        x.grad = None
    loss = function(*inputs)
    if loss.requires_grad:
        loss.backward()
    return loss.detach()


def _step(function: Callable[..., Tensor], inputs: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Seconds, and peak memory in MiB beyond inputs and gradients."""
    for x in inputs:
        x.grad = None
    ctypes.CDLL(None).malloc_trim(0)
    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    times = []
    while not times or (sum(times) < 10 * QUICK and times[0] < QUICK):
        began = time.perf_counter()
        _run(function, inputs)
        times.append(time.perf_counter() - began)
    peak = next(
        int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line
    )
    gradients = sum(x.grad.nbytes for x in inputs)
    return statistics.median(times), max(0.0, (peak - before - gradients) / MIB)


def _samples(function: Callable[..., Tensor], inputs: tuple[Tensor, Tensor]) -> list[Tensor]:
    """The loss, and some rows of each gradient."""
    loss = _run(function, inputs)
    return [loss.float(), *(x.grad[:64].float() for x in inputs)]


def check(case: Case, samples: dict[str, list[Tensor]]) -> None:
    """Refuse to time contenders that do not compute the same.

    Raises:
        RuntimeError: names the contender.
    """
    allowed = AGREEMENT[getattr(torch, case.dtype)]
    for name, found in samples.items():
        for x, y in zip(found, samples[OURS], strict=True):
            apart = float((x - y).norm() / y.norm())
            if not apart <= allowed:
                raise RuntimeError(f"{name} differs from {OURS!r} by {apart:.1e} on {case}: nothing was timed")


def measure(case: Case, processes: dict[str, Process], rounds: int) -> dict[str, Any]:
    """Seconds and extra MiB of every turn, by contender."""
    names = contenders(case)
    samples = {name: processes[name].ask((case, len(names) > 1)) for name in names}
    if len(names) > 1:
        check(case, samples)
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            if not turns[name] or turns[name][0][0] < SLOW:
                turns[name].append(processes[name].ask("step"))
    for name in names:
        processes[name].ask((Case(1, 1), False))  # lets go of the rows
    print(case, {name: [f"{s:.4f} s, {m:.0f} MiB" for s, m in x] for name, x in turns.items()}, flush=True)
    return {
        name: {"seconds": [s for s, _ in x], "extra_mib": max(round(m, 1) for _, m in x)} for name, x in turns.items()
    }


def crossover(results: list[dict[str, Any]], width: int) -> str:
    """The batch from which tiles are as fast as our whole matrix, between the cases measured: "auto" changes there."""
    ratios = []
    for result in results:
        found = result["contenders"]
        if result["width"] == width and result["dtype"] == "float32" and AT_ONCE in found and found[AT_ONCE]["seconds"]:
            ratios.append((result["rows"], min(found[TILES]["seconds"]) / min(found[AT_ONCE]["seconds"])))
    for (rows, ratio), (more, lower) in itertools.pairwise(ratios):
        if ratio > 1 >= lower:
            share = math.log(ratio) / (math.log(ratio) - math.log(lower))
            return f"d {width}: N ≈ {round(rows * (more / rows) ** share)}"
    return f"d {width}: above N {ratios[-1][0]}" if ratios else ""


def table(results: list[dict[str, Any]]) -> list[dict[str, str]]:
    """One row a case."""
    rows = []
    for result in results:
        found = result["contenders"]
        row = {"": result["case"]}
        for name in CONTENDERS:
            times = found[name]["seconds"] if name in found else []
            row[f"{name}, s"] = _two_digits(statistics.median(times)) if times else ""
        for name in CONTENDERS:
            row[f"{name}, extra MiB"] = f"{found[name]['extra_mib']:.0f}" if name in found else ""
        rows.append(row)
    return rows


def _two_digits(seconds: float) -> str:
    return f"{seconds:.2g}" if seconds < 100 else f"{seconds:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description="The contrastive loss against its peers, forward and backward.")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender (default 3)")
    parser.add_argument("--only", default="", help="only cases whose name contains this; the others stay as recorded")
    parser.add_argument("--memory-only", action="store_true", help="record no times: other programs are running")
    arguments = parser.parse_args()
    chosen = [case for case in CASES if arguments.only in str(case)]
    found = {}
    processes = {name: Process(name) for name in sorted({name for case in chosen for name in contenders(case)})}
    for case in chosen:
        measured = measure(case, processes, arguments.rounds)
        for turns in measured.values() if arguments.memory_only else ():
            turns["seconds"] = []
        found[str(case)] = {"case": str(case), **asdict(case), "contenders": measured}
    for process in processes.values():
        process.ask(None)
    if arguments.only and RESULTS.exists():
        found = {result["case"]: result for result in json.loads(RESULTS.read_text())["cases"]} | found
    publish([found[str(case)] for case in CASES if str(case) in found], arguments.rounds)


def publish(results: list[dict[str, Any]], rounds: int) -> None:
    """Print the table, write the file, and the README's rows where it has the markers."""
    crossovers = "; ".join(filter(None, (crossover(results, width) for width in (384, 768, 4096))))
    text = markdown_table(table(results))
    print(f"{text}\nTiles are as fast as our whole matrix at {crossovers}")
    about = machine()
    write_json(RESULTS, {"machine": about, "rounds": rounds, "crossover": crossovers, "cases": results})
    note = (
        f"N queries against N documents, forward and backward; memory beyond inputs and gradients; medians of {rounds} "
        f"turns (one, where a turn takes over {SLOW:.0f} s). Tiles are as fast as our whole matrix at {crossovers}; "
        f"ours changes at N = {math.isqrt(WHOLE_BYTES['plain'] // 4)}, for a few times less memory. "
        f"{about['processor']}, {about['cores']} cores; torch {about['torch']}, sentence-transformers "
        f"{about['sentence-transformers']}; {about['date']}."
    )
    update_readme(README_ROWS, f"{note}\n\n{text}")


if __name__ == "__main__":
    main()
