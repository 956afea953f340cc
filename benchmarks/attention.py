"""Attention on a CPU, ours against one call of PyTorch's a sequence, forward and backward.

    python -m benchmarks.attention         # prints the table, writes results/attention.json and the README's rows

The contenders take turns, so that a machine whose speed drifts drifts for all, and what they compute is compared before
anything is timed. PyTorch's is given every advantage: one split and one join a pass, and with grouped heads the faster
of its own handling of them and repeated keys.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.report import machine, markdown_table, update_readme, write_json
from llm2vec_fast.kernels.attention import attention
from llm2vec_fast.kernels.layout import SequenceLayout
from llm2vec_fast.precision import cpu_bfloat16_features

RESULTS = Path(__file__).parent / "results" / "attention.json"
OURS = "ours"
# A share of the largest value: far above rounding, far below a mistake.
LARGEST_DIFFERENCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
Inputs = tuple[Tensor, Tensor, Tensor]
Contender = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """A packed batch and the heads of a model."""

    name: str
    lengths: tuple[int, ...]
    heads: int = 9
    kv_heads: int = 3
    head_dim: int = 64

    def inputs(self, dtype: torch.dtype) -> Inputs:
        total, heads = sum(self.lengths), (self.heads, self.kv_heads, self.kv_heads)
        generator = torch.Generator().manual_seed(0)
        return tuple(torch.randn(total, n, self.head_dim, generator=generator).to(dtype) for n in heads)


def mixed_lengths(count: int) -> tuple[int, ...]:
    """Like those of docstrings: half have at most 33 tokens, one in twenty more than 150."""
    draw = random.Random(0)
    return tuple(min(512, 3 + round(draw.lognormvariate(3.4, 1.0))) for _ in range(count))


SHAPES = (
    Shape("256 × 16", (16,) * 256),
    Shape("64 × 64", (64,) * 64),
    Shape("32 × 128", (128,) * 32),
    Shape("8 × 512", (512,) * 8),
    Shape("2 × 2048", (2048,) * 2),
    Shape("100 texts, mixed", mixed_lengths(100)),
    Shape("8192, 500 × 16", (8192, *(16,) * 500)),
    Shape("32 × 128, 8 heads of 128", (128,) * 32, 8, 8, 128),
    Shape("2 × 2048, 8 heads of 128", (2048,) * 2, 8, 8, 128),
    Shape("100 texts, mixed, 8 heads of 128", mixed_lengths(100), 8, 8, 128),
)


def contenders(shape: Shape) -> dict[str, Contender]:
    """Ours first; each takes (T, H, D) tensors and returns (T, Hq, D). One layout serves them all, as in a model."""
    layout = SequenceLayout.from_lengths(shape.lengths)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, layout, backend="blocked")

    def one_by_one(repeat: bool) -> Contender:
        def run(*tensors: Tensor) -> Tensor:
            parts = [x.split(shape.lengths) for x in tensors]
            return torch.cat(
                [_one(*(x.transpose(0, 1)[None] for x in part), repeat) for part in zip(*parts, strict=True)]
            )

        return run

    if shape.heads == shape.kv_heads:
        return {OURS: ours, "one by one": one_by_one(repeat=False)}
    return {OURS: ours, "one by one": one_by_one(repeat=False), "one by one, keys repeated": one_by_one(repeat=True)}


def _one(q: Tensor, k: Tensor, v: Tensor, repeat: bool) -> Tensor:
    """One sequence: q (1, Hq, L, D), k and v (1, Hkv, L, D) → (L, Hq, D)."""
    shared = q.shape[1] // k.shape[1]
    if repeat:
        k, v = (x.repeat_interleave(shared, 1) for x in (k, v))
    out = scaled_dot_product_attention(q, k, v, enable_gqa=shared > 1 and not repeat)
    return out[0].transpose(0, 1)


def inference(contender: Contender, inputs: Inputs) -> list[Tensor]:
    with torch.inference_mode():
        return [contender(*inputs)]


def training(contender: Contender, inputs: Inputs) -> list[Tensor]:
    """Output and the three gradients."""
    tensors = [x.detach().requires_grad_() for x in inputs]
    out = contender(*tensors)
    return [out.detach(), *torch.autograd.grad(out, tensors, inputs[0])]  # any gradient will do: the queries


PASSES = {"inference": inference, "training": training}


def compare(ours: list[Tensor], theirs: list[Tensor], dtype: torch.dtype, shape: Shape) -> float:
    """The largest difference, as a share of the largest value.

    Raises:
        ValueError: they compute different things.
    """
    shares = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True)]
    if not max(shares) <= LARGEST_DIFFERENCE[dtype]:
        raise ValueError(f"{shape.name}, {dtype}: results differ by {max(shares):.1e} of the largest value")
    return max(shares)


def measure(shape: Shape, dtype: torch.dtype, kind: str, seconds: float) -> dict:
    """Outputs first, which is also the warm-up; then turns, at least three, for about ``seconds``."""
    inputs, run = shape.inputs(dtype), PASSES[kind]
    competitors = contenders(shape)
    results = {name: run(contender, inputs) for name, contender in competitors.items()}
    difference = max(compare(results[OURS], results[name], dtype, shape) for name in competitors if name != OURS)
    del results
    times: dict[str, list[float]] = {name: [] for name in competitors}
    began = time.perf_counter()
    while len(times[OURS]) < 3 or time.perf_counter() - began < seconds:
        for name, contender in competitors.items():
            before = time.perf_counter()
            run(contender, inputs)
            times[name].append(time.perf_counter() - before)
    medians = {name: statistics.median(rounds) for name, rounds in times.items()}
    best = min((name for name in competitors if name != OURS), key=medians.get)
    ratio = statistics.median(b / a for a, b in zip(times[OURS], times[best], strict=True))
    return {"milliseconds": {n: 1e3 * m for n, m in medians.items()}, "best_peer": best, "ratio": ratio,
            "rounds": len(times[OURS]), "largest_difference": difference}  # fmt: skip


def table_row(shape: Shape, dtype: torch.dtype, results: dict[str, dict]) -> dict[str, str]:
    row = {"batch": shape.name, "dtype": str(dtype).removeprefix("torch.")}
    for kind, result in results.items():
        ours, peer = result["milliseconds"][OURS], result["milliseconds"][result["best_peer"]]
        row |= {
            f"{kind}: ours, ms": f"{ours:.1f}",
            f"{kind}: one by one, ms": f"{peer:.1f}",
            f"{kind}: ×": f"{result['ratio']:.2f}",
        }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description="Attention on a CPU against one call of PyTorch's a sequence.")
    parser.add_argument("--seconds", type=float, default=1.0, help="of turns a batch, dtype and pass (default 1)")
    parser.add_argument("--only", default="", help="batches whose name holds this; prints, writes nothing")
    arguments = parser.parse_args()
    dtypes = [torch.float32, *([torch.bfloat16] if cpu_bfloat16_features() else [])]
    rows, records = [], []
    for shape in (shape for shape in SHAPES if arguments.only in shape.name):
        for dtype in dtypes:
            results = {kind: measure(shape, dtype, kind, arguments.seconds) for kind in PASSES}
            rows.append(table_row(shape, dtype, results))
            records.append({**asdict(shape), "dtype": str(dtype), **results})
            print(" | ".join(rows[-1].values()), flush=True)
    table = markdown_table(rows)
    print(table)
    if not arguments.only:
        about = machine()
        write_json(RESULTS, {"machine": about, "threads": torch.get_num_threads(), "batches": records})
        threads = torch.get_num_threads()
        note = f"Medians. {about['processor']}, {threads} threads; torch {about['torch']}; {about['date']}."
        update_readme("attention", f"{note}\n\n{table}")


if __name__ == "__main__":
    main()
