"""The in-batch contrastive loss from small batches to very large ones, against a product and a cross-entropy.

FLOP are those of three products of N × N × d, one forward and two backward; what is computed again is not counted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from benchmarks.gpu.contest import Contender, Work, compete
from benchmarks.gpu.matrix_loss import matrix_loss, plain_mean
from benchmarks.gpu.operation import JUDGED_ROWS, resolve
from benchmarks.gpu.section import Context, Row
from benchmarks.gpu.timing import Clock

SIZES = (65536, 4096, 16384, 1024)  # the target's first
WIDTH = 768
SCALE = 20.0
SECONDS_A_CASE = 8.0


def rows(context: Context) -> Iterator[Row]:
    """Every size with every contender."""
    contrastive_loss = resolve("contrastive_loss")
    width, dtype = (16, torch.float16) if context.smoke else (WIDTH, torch.bfloat16)

    def ours(queries: Tensor, documents: Tensor) -> Tensor:
        return contrastive_loss(queries, documents, scale=SCALE, backend="triton")

    for size in (20,) if context.smoke else SIZES:
        name = f"N = {size}, d = {width}"
        if context.left() < SECONDS_A_CASE:
            yield {"case": name, "verdict": "not run", "note": "no time left"}
            continue
        torch.manual_seed(0)
        queries = normalize(torch.randn(size, width, device=context.device), dim=1).to(dtype)
        noise = torch.randn(size, width, device=context.device) * width**-0.5
        documents = normalize(queries.float() + noise, dim=1).to(dtype)
        ours(queries[:16], documents[:16])  # without Triton kernels, it says so here
        work = _work(name, queries, documents, context.peaks.get("matmul TFLOP/s"))
        makers = {
            key: functools.partial(_contender, call, queries, documents)
            for key, call in (("ours, Triton", ours), ("product and cross-entropy", _plain))
        }
        yield from compete(work, makers, Clock(context.smoke), context.smoke)


def _work(name: str, queries: Tensor, documents: Tensor, peak: float | None) -> Work:
    targets = torch.arange(len(queries), device=queries.device)
    results = [matrix_loss(queries.to(d), documents.to(d), targets, SCALE) for d in (torch.float64, queries.dtype)]
    losses = (results[0].row_losses.mean(), plain_mean(results[1], results[0]))
    tangents = [
        [_tangent(x, base) for x, base in ((result.rows, queries), (result.matrix, documents))] for result in results
    ]
    product = 2 * len(queries) * documents.numel() / 1e9
    truths = ((loss, *pair) for loss, pair in zip(losses, tangents, strict=True))
    return Work(name, *truths, {"forward": product, "both": 3 * product}, peak=peak)


def _contender(call: Callable[..., Tensor], queries: Tensor, documents: Tensor) -> Contender:
    leaves = tuple(x.detach().requires_grad_() for x in (queries, documents))
    bases = iter((queries, documents))

    def comparable(x: Tensor) -> Tensor:
        return x.float() if x.ndim == 0 else _tangent(x, next(bases))

    return Contender(call, leaves, (torch.ones((), device=queries.device),), comparable)


def _tangent(gradient: Tensor, base: Tensor) -> Tensor:
    """Without the part along the row itself, which a loss that takes the cosine of unit rows leaves out; some rows."""
    wide, base = gradient[::JUDGED_ROWS].double(), base[::JUDGED_ROWS].double()
    return (wide - (wide * base).sum(1, keepdim=True) / base.square().sum(1, keepdim=True) * base).to(gradient.dtype)


def _plain(queries: Tensor, documents: Tensor) -> Tensor:
    return cross_entropy((queries @ documents.T).float() * SCALE, torch.arange(len(queries), device=queries.device))
