"""The element-wise operations on a CPU: ours against the modules of transformers that they replace.

    python -m benchmarks.elementwise     # prints the table, writes results/elementwise.json and its page; four minutes

The two take turns on the same tensors; results are compared before anything is timed. A turn repeats the operation for
20 ms, and who begins a round changes. Where tensors come to lie in memory decides as much as the code does and stays as
it is while a process lives, so that all is measured anew in several processes, one after another: what counts is the
median of their medians, and the spread is their range. What a training step keeps for its backward pass is counted, not
measured: bytes of saved tensors that are not inputs.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn.functional import silu
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from benchmarks.report import machine, markdown_table, update_readme, write_json
from llm2vec_fast.kernels import SequenceLayout, pool, rms_norm, rotary, swiglu

RESULTS = Path(__file__).parent / "results" / "elementwise.json"
EPS, MIB = 1e-6, 1024 * 1024
TEXT_LENGTH = 64
SHORTEST_TURN = 0.02  # seconds: calls are repeated until a turn takes this long
WARM_UP = 5  # calls
NOISE = 1.03  # the ratio up to which nothing is said to be slower
# What glibc still takes from its heap: once a tensor of this size was freed, as in any process that has run a model, it
# keeps twice as much for the next ones. Before that, page faults decide who is faster.
LARGEST_HEAP_BYTES = 31 * MIB


@dataclass(frozen=True)
class Shape:
    """The rows of a batch, and the widths of a model; ``trained``: whether anybody trains on such a batch."""

    name: str
    rows: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    trained: bool = True


SHAPES = (
    Shape("SmolLM2-135M", 2048, 576, 1536, 9, 3, 64),
    Shape("SmolLM2-135M, one text", TEXT_LENGTH, 576, 1536, 9, 3, 64, trained=False),
    Shape("Llama-3-8B", 1024, 4096, 14336, 32, 8, 128),
)
Call = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Operation:
    """Ours and theirs: called with the same tensors, of which the first ``free`` need gradients."""

    ours: Call
    theirs: Call
    tensors: tuple[Tensor, ...]
    free: int


def operations(shape: Shape, dtype: torch.dtype) -> dict[str, Operation]:
    """Everything that is measured for a model and dtype."""
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    x, residual, weight = random(1, shape.rows, shape.width), random(1, shape.rows, shape.width), random(shape.width)
    gate, up = random(1, shape.rows, shape.inner), random(1, shape.rows, shape.inner)
    q = random(1, shape.rows, shape.heads, shape.head_dim).transpose(1, 2)
    k = random(1, shape.rows, shape.kv_heads, shape.head_dim).transpose(1, 2)
    angles = torch.randn(1, shape.rows, shape.head_dim // 2, generator=generator).repeat(1, 1, 2)
    layout = SequenceLayout.from_lengths([TEXT_LENGTH] * (shape.rows // TEXT_LENGTH))

    def norm(x: Tensor, weight: Tensor) -> tuple[Tensor]:
        return (LlamaRMSNorm.forward(SimpleNamespace(weight=weight, variance_epsilon=EPS), x),)

    def add_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = residual + x
        return (*norm(total, weight), total)

    gelu = ACT2FN["gelu_pytorch_tanh"]

    def means(hidden: Tensor) -> tuple[Tensor]:
        return (torch.stack([rows.float().mean(0) for rows in hidden.split(TEXT_LENGTH)]),)

    return {
        "rms_norm": Operation(lambda x, w: (rms_norm(x, w, EPS),), norm, (x, weight), 2),
        "rms_norm, weight frozen": Operation(lambda x, w: (rms_norm(x, w, EPS),), norm, (x, weight), 1),
        "add and rms_norm": Operation(lambda x, r, w: rms_norm(x, w, EPS, r), add_norm, (x, residual, weight), 3),
        "rotary": Operation(rotary, apply_rotary_pos_emb, (q, k, angles.cos().to(dtype), angles.sin().to(dtype)), 2),
        "swiglu": Operation(lambda g, u: (swiglu(g, u),), lambda g, u: (silu(g) * u,), (gate, up), 2),
        "gelu gate": Operation(lambda g, u: (swiglu(g, u, "gelu_tanh"),), lambda g, u: (gelu(g) * u,), (gate, up), 2),
        "mean pooling": Operation(lambda h: (pool(h, layout),), means, (x[0],), 1),
    }


def step(call: Call, operation: Operation, training: bool) -> list[Tensor]:
    """One pass: outputs, and in training the gradients too."""
    if not training:
        with torch.inference_mode():
            return list(call(*operation.tensors))
    given = [x.detach().requires_grad_(i < operation.free) for i, x in enumerate(operation.tensors)]
    outputs = call(*given)
    return [*outputs, *torch.autograd.grad(outputs, given[: operation.free], [torch.ones_like(x) for x in outputs])]


def kept_bytes(call: Call, operation: Operation) -> int:
    """What the forward pass keeps for the backward pass, inputs aside; tensors that share memory count once."""
    given = [x.detach().requires_grad_(i < operation.free) for i, x in enumerate(operation.tensors)]
    inputs, kept = {x.untyped_storage().data_ptr() for x in given}, {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        outputs = call(*given)
    assert len(outputs) > 0
    return sum(size for address, size in kept.items() if address not in inputs)


def seconds(run: Callable[[], object], calls: int) -> float:
    began = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - began) / calls


def measure(operation: Operation, training: bool, rounds: int) -> dict:
    """Medians of turns, and the bytes kept."""
    pair = {"ours": operation.ours, "theirs": operation.theirs}
    runs = {name: (lambda call=call: step(call, operation, training)) for name, call in pair.items()}
    for ours, theirs in zip(runs["ours"](), runs["theirs"](), strict=True):
        error = (ours.double() - theirs.double()).norm() / theirs.double().norm()
        assert error < 4 * torch.finfo(operation.tensors[0].dtype).eps, f"results differ by {error:.1e}"
    for run in runs.values():
        seconds(run, WARM_UP)
    calls = max(1, math.ceil(SHORTEST_TURN / min(seconds(run, WARM_UP) for run in runs.values())))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds):
        for name in sorted(runs, reverse=i % 2 == 1):
            times[name].append(seconds(runs[name], calls))
    result = {f"{name}_seconds": statistics.median(times[name]) for name in pair}
    result["ratio"] = statistics.median(a / b for a, b in zip(times["ours"], times["theirs"], strict=True))
    if training:
        result |= {f"{name}_kept": kept_bytes(call, operation) for name, call in pair.items()}
    return result


def measure_all(rounds: int, only: str) -> dict[str, dict]:
    """Every case whose name holds ``only``, measured in this process."""
    torch.empty(LARGEST_HEAP_BYTES, dtype=torch.uint8)
    results: dict[str, dict] = {}
    for shape in SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            for operation_name, operation in operations(shape, dtype).items():
                for training in (False, True) if shape.trained else (False,):
                    kind = "training" if training else "use"
                    name = ", ".join((shape.name, str(dtype).removeprefix("torch."), operation_name, kind))
                    if only in name:
                        results[name] = measure(operation, training, rounds)
    return results


def together(results: list[dict]) -> dict:
    """One case, as measured in several processes: the median of each number, and every process's ratio."""
    medians = {name: statistics.median(result[name] for result in results) for name in results[0]}
    return medians | {"ratios": sorted(result["ratio"] for result in results)}


def row(name: str, result: dict) -> dict[str, str]:
    """One line of the table."""
    kept = "ours_kept" in result
    return {
        "": name,
        "ours": f"{result['ours_seconds'] * 1000:.2f} ms",
        "transformers": f"{result['theirs_seconds'] * 1000:.2f} ms",
        "time, ours / theirs": f"{result['ratio']:.2f}",
        "range": f"{result['ratios'][0]:.2f} … {result['ratios'][-1]:.2f}",
        "kept, ours": f"{result['ours_kept'] / MIB:.1f} MiB" if kept else "",
        "kept, theirs": f"{result['theirs_kept'] / MIB:.1f} MiB" if kept else "",
    }


def verdict(results: dict[str, dict]) -> str:
    """In words, where ours is slower, in every process or in most, and whether it then keeps less."""
    slower = {name: result for name, result in results.items() if result["ratio"] > NOISE}
    always = {name for name, result in slower.items() if result["ratios"][0] > 1}
    leaner = {name for name, result in slower.items() if result.get("ours_kept", 0) < result.get("theirs_kept", 0)}

    def listed(names: set[str]) -> str:
        return "; ".join(f"{name} ({_difference(slower[name])})" for name in slower if name in names) or "none"

    return (
        f"Ours is slower in every process in {len(always)} of {len(results)} cases. "
        f"There it keeps less for the backward pass in: {listed(always & leaner)}. "
        f"It keeps no less in: {listed(always - leaner)}. "
        f"It is slower in most processes and faster in others in: {listed(slower.keys() - always)}."
    )


def _difference(result: dict) -> str:
    more = (result["ours_seconds"] - result["theirs_seconds"]) * 1e6
    return f"{result['ratio']:.2f}, {more:+.0f} µs"


def main() -> None:
    parser = argparse.ArgumentParser(description="Element-wise operations against transformers' modules, on a CPU.")
    parser.add_argument("--processes", type=int, default=5, help="how often all is measured anew (default 5)")
    parser.add_argument("--rounds", type=int, default=6, help="turns of each in a process (default 6)")
    parser.add_argument("--only", default="", help="only cases whose name holds this text; writes nothing")
    arguments = parser.parse_args()
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        tasks = [pool.submit(measure_all, arguments.rounds, arguments.only) for _ in range(arguments.processes)]
        runs = [task.result() for task in tasks]
    results = {name: together([run[name] for run in runs]) for name in runs[0]}
    table = markdown_table([row(name, result) for name, result in results.items()])
    print(verdict(results), table, sep="\n\n")
    if not arguments.only:
        about, threads = machine(), torch.get_num_threads()
        settings = {"threads": threads, "processes": arguments.processes, "rounds": arguments.rounds}
        write_json(RESULTS, {"machine": about, **settings, "cases": results})
        where = f"{about['processor']}, {threads} threads; torch {about['torch']}; {about['date']}"
        note = f"Medians of {arguments.processes} processes of {arguments.rounds} rounds. {where}. {verdict(results)}"
        update_readme("elementwise", f"{note}\n\n{table}")


if __name__ == "__main__":
    main()
