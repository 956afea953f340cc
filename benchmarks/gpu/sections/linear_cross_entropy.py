"""Cross-entropy over a large vocabulary, against logits that are written out, in time and memory.

FLOP are those of the labelled rows' products: one forward, and one backward for each of rows and weight.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from benchmarks.gpu.contest import Contender, Work, compete
from benchmarks.gpu.matrix_loss import matrix_loss, plain_mean
from benchmarks.gpu.operation import resolve
from benchmarks.gpu.section import Context, Row
from benchmarks.gpu.timing import Clock

IGNORED = -100
# Share of tokens with a label, and whether the weight is trained: masked next tokens, then ordinary language modelling.
CASES = ((0.2, True), (0.2, False), (1.0, True))
SECONDS_A_CASE = 10.0


def rows(context: Context) -> Iterator[Row]:
    """Every case with every contender."""
    linear_cross_entropy = resolve("linear_cross_entropy")
    tokens, vocabulary, width = (24, 90, 16) if context.smoke else (8192, 128256, 2048)
    dtype = torch.float16 if context.smoke else torch.bfloat16

    def ours(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, labels, backend="triton")

    contenders = {"ours, Triton": ours, "logits of labelled rows": _labelled, "logits of every row": _all}
    for share, trained in CASES:
        name = f"V = {vocabulary}, d = {width}, {share:.0%} of {tokens} labelled"
        name += ", weight trained" if trained else ", weight frozen"
        if context.left() < SECONDS_A_CASE:
            yield {"case": name, "verdict": "not run", "note": "no time left"}
            continue
        torch.manual_seed(0)
        hidden = torch.randn(tokens, width, device=context.device).to(dtype)
        weight = (torch.randn(vocabulary, width, device=context.device) * width**-0.5).to(dtype)
        labels = torch.randint(vocabulary, (tokens,), device=context.device)
        labels[1:][torch.rand(tokens - 1, device=context.device) > share] = IGNORED
        ours(hidden[:1], weight[:16], labels[:1].clamp(max=15))  # without Triton kernels, it says so here
        problem = _Problem(hidden, weight, labels, trained, 1 if context.smoke else 64)
        work = problem.work(name, context.peaks.get("matmul TFLOP/s"))
        makers = {key: functools.partial(problem.contender, call) for key, call in contenders.items()}
        yield from compete(work, makers, Clock(context.smoke), context.smoke)


class _Problem:
    """Rows, weight and labels; of the weight's gradient every ``stride``-th row is compared."""

    def __init__(self, hidden: Tensor, weight: Tensor, labels: Tensor, trained: bool, stride: int) -> None:
        self.hidden, self.weight, self.labels, self.trained, self.stride = hidden, weight, labels, trained, stride

    def work(self, name: str, peak: float | None) -> Work:
        kept = self.labels != IGNORED
        results = [
            matrix_loss(self.hidden[kept].to(d), self.weight.to(d), self.labels[kept], stride=self.stride)
            for d in (torch.float64, self.hidden.dtype)
        ]
        losses = (results[0].row_losses.mean(), plain_mean(results[1], results[0]))
        truths = []
        for loss, result in zip(losses, results, strict=True):
            scattered = torch.zeros_like(self.hidden, dtype=result.rows.dtype)
            scattered[kept] = result.rows
            truths.append((loss, scattered, *([result.matrix] if self.trained else [])))
        product = 2 * int(kept.sum()) * self.weight.numel() / 1e9
        return Work(name, *truths, {"forward": product, "both": (3 if self.trained else 2) * product}, peak=peak)

    def contender(self, call: Callable[..., Tensor]) -> Contender:
        hidden = self.hidden.detach().requires_grad_()
        weight = self.weight.detach().requires_grad_(self.trained)
        one = torch.ones((), device=hidden.device)
        return Contender(lambda h, w: call(h, w, self.labels), (hidden, weight), (one,), self._comparable)

    def _comparable(self, x: Tensor) -> Tensor:
        if x.ndim == 0:
            return x.float()
        return x[:: self.stride] if x.shape == self.weight.shape else x


def _labelled(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    kept = labels != IGNORED
    return cross_entropy(linear(hidden[kept], weight).float(), labels[kept])


def _all(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(linear(hidden, weight).float(), labels, ignore_index=IGNORED)
