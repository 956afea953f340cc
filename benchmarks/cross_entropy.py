"""One training step of the masked-token loss, forward and backward: ours against what else PyTorch offers on a CPU.

    python -m benchmarks.cross_entropy     # prints the table, writes results/cross_entropy.json

Every contender runs in a process of its own, and they take turns. Losses and gradients are compared before anything is
timed. Memory is the peak of resident memory in the step, less what was there before it and the gradients it leaves.
The whole takes about eight minutes: for that not every contender enters every case, and slow ones have one turn.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.report import machine, markdown_table, update_readme, write_json

RESULTS = Path(__file__).parent / "results" / "cross_entropy.json"
README_ROWS = "cross-entropy"
ROWS = 4096
IGNORED = -100
SLOW = 4.0  # seconds; a turn that takes longer is not repeated
MIB = 1024 * 1024
# Losses and gradients of two contenders may differ by roundings of the dtype, not more.
AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Case:
    """One shape of the loss; a share of the rows has labels."""

    dtype: str
    vocabulary: int
    width: int
    labelled: float
    trained: bool

    def __str__(self) -> str:
        weight = "trained" if self.trained else "frozen"
        return f"{self.dtype}, V {self.vocabulary}, d {self.width}, {self.labelled:.0%} labelled, weight {weight}"


def ours(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from llm2vec_fast.kernels.cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, weight, labels)


def labelled_rows(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The honest baseline: ignored rows dropped, then all logits of the others."""
    kept = labels != IGNORED
    return F.cross_entropy(F.linear(hidden[kept], weight), labels[kept])


def every_row(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """What a stock causal language model computes."""
    return F.cross_entropy(F.linear(hidden, weight), labels)


def torch_chunked(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """PyTorch's own fused loss, in chunks of rows."""
    return F.linear_cross_entropy(hidden, weight, labels, options=torch.nn.LinearCrossEntropyOptions())


OURS, BASELINE = "ours", "labelled rows"
CONTENDERS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    OURS: ours,
    BASELINE: labelled_rows,
    "all rows": every_row,
    "torch's fused": torch_chunked,
}
CASES = [
    *(Case("bfloat16", 32000, width, 0.2, trained) for width in (576, 4096) for trained in (False, True)),
    *(Case("bfloat16", 128256, width, 0.2, trained) for width in (576, 2048, 4096) for trained in (False, True)),
    *(Case("bfloat16", entries, 576, 1.0, trained) for entries in (32000, 128256) for trained in (False, True)),
    *(Case("float32", 32000, width, 0.2, trained) for width in (576, 2048) for trained in (False, True)),
    *(Case("float32", 128256, 576, share, trained) for share in (0.2, 1.0) for trained in (False, True)),
]
# Only the shapes that everybody finishes in seconds.
EVERYBODY = [case for case in CASES if case.width == 576 and case.labelled < 1 and case.vocabulary == 32000]


def contenders(case: Case) -> list[str]:
    """Who enters a case."""
    names = [OURS, BASELINE] if case not in EVERYBODY else list(CONTENDERS)
    return [name for name in names if CONTENDERS[name] is not torch_chunked or hasattr(F, "linear_cross_entropy")]


class Process:
    """A contender in a process of its own."""

    def __init__(self, name: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, name), daemon=True)
        self._process.start()

    def ask(self, question: Case | str | None) -> Any:
        """A case: prepare it, and return loss and samples of the gradients; "step": seconds and extra MiB of one."""
        self._pipe.send(question)
        return self._pipe.recv() if question is not None else self._process.join()


def _serve(pipe: Connection, name: str) -> None:
    function = CONTENDERS[name]
    inputs: tuple[Tensor, Tensor, Tensor] | None = None
    while (question := pipe.recv()) is not None:
        if isinstance(question, Case):
            inputs = None
            inputs = _inputs(question)
            _step(function, inputs)
            pipe.send(_samples(function, inputs))
        else:
            pipe.send(_step(function, inputs))


def _inputs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, case.dtype)
    weight = torch.empty(case.vocabulary, case.width, dtype=dtype).normal_(generator=generator)
    labels = torch.randint(case.vocabulary, (ROWS,), generator=generator)
    hidden = torch.randn(ROWS, case.width, generator=generator) * 2 / case.width**0.5
    hidden += weight[labels] * (6 / case.width)  # the label is often likely, as in training
    labels[torch.rand(ROWS, generator=generator) >= case.labelled] = IGNORED
    return hidden.to(dtype).requires_grad_(), weight.requires_grad_(case.trained), labels


def _step(function: Callable[..., Tensor], inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[float, float]:
    """Seconds, and peak memory in MiB beyond inputs and gradients."""
    hidden, weight, labels = inputs
    hidden.grad = weight.grad = None
    ctypes.CDLL(None).malloc_trim(0)
    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    began = time.perf_counter()
    function(hidden, weight, labels).backward()
    seconds = time.perf_counter() - began
    peak = next(
        int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line
    )
    gradients = sum(x.grad.nbytes for x in (hidden, weight) if x.grad is not None)
    return seconds, (peak - before - gradients) / MIB


def _samples(function: Callable[..., Tensor], inputs: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    """The loss, and some rows of each gradient."""
    hidden, weight, labels = inputs
    hidden.grad = weight.grad = None
    loss = function(hidden, weight, labels)
    loss.backward()
    rows = (labels != IGNORED).nonzero()[:64, 0]
    samples = [loss.detach(), hidden.grad[rows]]
    return [x.float() for x in (samples if weight.grad is None else [*samples, weight.grad[labels[rows]]])]


def check(case: Case, samples: dict[str, list[Tensor]]) -> None:
    """Refuse to time contenders that do not compute the same.

    Raises:
        RuntimeError: names the contender.
    """
    allowed = AGREEMENT[getattr(torch, case.dtype)]
    for name, found in samples.items():
        for x, y in zip(found, samples[BASELINE], strict=True):
            apart = float((x - y).norm() / y.norm())
            if not apart <= allowed:
                raise RuntimeError(f"{name} differs from {BASELINE!r} by {apart:.1e} on {case}: nothing was timed")


def measure(case: Case, processes: dict[str, Process], rounds: int) -> dict[str, Any]:
    """Seconds and extra MiB of every turn, by contender."""
    names = contenders(case)
    check(case, {name: processes[name].ask(case) for name in names})
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            if not turns[name] or (turns[name][0][0] < SLOW and name in (OURS, BASELINE)):
                turns[name].append(processes[name].ask("step"))
    print(case, {name: [f"{s:.2f} s, {m:.0f} MiB" for s, m in x] for name, x in turns.items()}, flush=True)
    return {
        name: {"seconds": [s for s, _ in x], "extra_mib": max(round(m, 1) for _, m in x)} for name, x in turns.items()
    }


def table(results: list[dict[str, Any]]) -> list[dict[str, str]]:
    """One row a case."""
    rows = []
    for result in results:
        found = result["contenders"]
        row = {"": result["case"]}
        ratio = statistics.median(
            a / b for a, b in zip(found[OURS]["seconds"], found[BASELINE]["seconds"], strict=False)
        )
        for name in CONTENDERS:
            row[f"{name}, s"] = f"{statistics.median(found[name]['seconds']):.2f}" if name in found else ""
        row["ours / labelled rows"] = f"{ratio:.2f}"
        for name in CONTENDERS:
            row[f"{name}, extra MiB"] = f"{found[name]['extra_mib']:.0f}" if name in found else ""
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="The masked-token loss against PyTorch's, forward and backward.")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender (default 3)")
    parser.add_argument("--only", default="", help="only cases whose name contains this; the others keep their results")
    arguments = parser.parse_args()
    processes = {name: Process(name) for name in CONTENDERS}
    chosen = [case for case in CASES if arguments.only in str(case)]
    results = [
        {"case": str(case), **asdict(case), "contenders": measure(case, processes, arguments.rounds)} for case in chosen
    ]
    for process in processes.values():
        process.ask(None)
    about = machine()
    if arguments.only and RESULTS.exists():
        measured = {result["case"]: result for result in json.loads(RESULTS.read_text())["cases"]}
        measured |= {result["case"]: result for result in results}
        results = [measured[str(case)] for case in CASES if str(case) in measured]
    write_json(RESULTS, {"machine": about, "settings": {"rows": ROWS, "rounds": arguments.rounds}, "cases": results})
    note = (
        f"{ROWS} rows, forward and backward; memory beyond inputs and gradients; medians of {arguments.rounds} turns. "
        f"{about['processor']}, {about['cores']} cores; torch {about['torch']}; {about['date']}."
    )
    text = f"{note}\n\n{markdown_table(table(results))}"
    print(text)
    update_readme(README_ROWS, text)


if __name__ == "__main__":
    main()
