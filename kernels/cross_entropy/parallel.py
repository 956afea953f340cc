"""The loss with the vocabulary split over processes: each holds some rows of the weight, all hold the same tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .blocked import forward_blocked
from .operator import compute_gradients, labelled, refuse_wrong_labels, spread
from .rule import Gradients, Problem, Rule, Statistics


def linear_cross_entropy_parallel(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, **settings: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, log-sum-exp (T,), log-probabilities (T,) and correct (T,); the same on every process. The first two are
    differentiable."""
    return _VocabularyParallel.apply(hidden, weight, bias, labels, settings)


class _VocabularyParallel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, settings: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        group, ignore_index, reduction = settings["group"], settings["ignore_index"], settings["reduction"]
        with torch.autocast(hidden.device.type, enabled=False):
            first, vocabulary = _place(weight, group)
            if settings["classes"] not in (None, vocabulary):
                raise ValueError(
                    f"class_weights has shape ({settings['classes']},): pass one an entry of the whole vocabulary, "
                    f"({vocabulary},)"
                )
            rule = Rule(settings["softcap"], settings["smoothing"], settings["z_loss"], vocabulary)
            problem = labelled(hidden, weight, bias, labels, ignore_index, rule, first)
            if settings["check"]:
                refuse_wrong_labels(problem.labels + first, problem.rows, vocabulary, ignore_index)
            statistics = _joined(_statistics(problem, settings["accuracy"], settings["backend"]), group)
            losses = rule.losses(statistics)
        grad = 1 / max(1, losses.shape[0]) if reduction == "mean" else 1.0
        loss = spread(losses, problem) if reduction == "none" else losses.sum() * grad
        lse, log_probs = spread(statistics.lse, problem), spread(statistics.label - statistics.lse, problem)
        correct = (
            spread(statistics.label >= statistics.highest, problem) if settings["accuracy"] else labels.new_empty(0)
        )
        ctx.mark_non_differentiable(log_probs, correct)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, problem.rows, problem.labels, statistics.lse)
        ctx.rule, ctx.grad, ctx.group, ctx.backend = rule, grad, group, settings["backend"]
        return loss, lse, log_probs, correct

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None and grad_lse is None:
            return (None,) * 5
        hidden, weight, bias, rows, labels, lse = ctx.saved_tensors
        grad = lse.new_zeros(()) if grad is None else grad
        # Of the hidden states every process makes a part, and parts are added before they are rounded.
        dtypes = (torch.promote_types(hidden.dtype, torch.float32), weight.dtype, weight.dtype)
        needed = zip((hidden, weight, bias), dtypes, ctx.needs_input_grad[:3], strict=True)
        gradients = Gradients(*(torch.empty_like(x, dtype=dtype) if need else None for x, dtype, need in needed))
        row_grad = (grad.index_select(0, rows) if grad.ndim else grad.expand(rows.shape[0])) * ctx.grad
        factor = ctx.rule.softmax_factor(row_grad, lse)
        if grad_lse is not None:
            factor = factor + grad_lse.index_select(0, rows)
        problem = Problem(hidden, weight, bias, rows, labels, ctx.rule)
        with torch.autocast(hidden.device.type, enabled=False):
            compute_gradients(problem, lse, row_grad, factor, gradients, ctx.backend)
        grad_hidden = None
        if gradients.hidden is not None:
            total = gradients.hidden.index_select(0, rows)
            dist.all_reduce(total, group=ctx.group)
            grad_hidden = torch.zeros_like(hidden).index_copy_(0, rows, total.to(hidden.dtype))
        return grad_hidden, gradients.weight, gradients.bias, None, None


def _place(weight: Tensor, group: dist.ProcessGroup) -> tuple[int, int]:
    """The number of this process's first entry, and how many entries all have."""
    here = torch.tensor([weight.shape[0]], device=weight.device)
    sizes = [torch.empty_like(here) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, here, group=group)
    counts = torch.cat(sizes).tolist()
    return sum(counts[: dist.get_rank(group)]), sum(counts)


def _statistics(problem: Problem, accuracy: bool, backend: str) -> Statistics:
    if problem.labels.shape[0] == 0:
        return Statistics(*problem.hidden.new_empty((4, 0), dtype=problem.accumulator))
    if backend == "triton":
        from .triton import forward_triton

        return forward_triton(problem, accuracy)
    return forward_blocked(problem, 1.0, Gradients())


def _joined(here: Statistics, group: dist.ProcessGroup) -> Statistics:
    """The statistics of the whole vocabulary from every process's: two exchanges of a few numbers a row."""
    highest = here.lse if here.highest is None else here.highest
    peaks = torch.stack([here.lse, highest])
    dist.all_reduce(peaks, dist.ReduceOp.MAX, group=group)
    total = torch.zeros_like(here.lse) if here.total is None else here.total
    absent = here.label.isnan()
    label = here.label.masked_fill(absent, 0.0)
    sums = torch.stack([(here.lse - peaks[0]).exp(), label, absent.to(total.dtype), total])
    dist.all_reduce(sums, group=group)
    label = sums[1].masked_fill(sums[2] == dist.get_world_size(group), float("nan"))  # a label that no process has
    return Statistics(peaks[0] + sums[0].log(), label, None if here.total is None else sums[3], peaks[1])
