"""The loss as PyTorch operators: whole to torch.compile, differentiable, with shapes known beforehand.

How many rows have a label is only known inside, so the shapes outside do not depend on it. A softcap of 0 means none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .blocked import forward_blocked, gradients_blocked
from .rule import Gradients, Problem, Rule, Statistics


@torch.library.custom_op("llm2vec_fast::linear_cross_entropy", mutates_args=())
def linear_cross_entropy_operator(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    softcap: float,
    smoothing: float,
    z_loss: float,
    reduction: str,
    needs: list[bool],
    accuracy: bool,
    return_lse: bool,
    check: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, lse (T,), log-probabilities (T,), correct (T,) bool; then the gradients of hidden, weight and bias for an
    upstream gradient of 1, empty where they are not formed here. The loss is differentiable, with ``return_lse`` lse
    is, too.

    ``needs`` says which of hidden, weight and bias want a gradient.
    """
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        rule = Rule(softcap or None, smoothing, z_loss, weight.shape[0])
        problem = labelled(hidden, weight, bias, labels, ignore_index, rule)
        if check:
            refuse_wrong_labels(problem.labels, problem.rows, rule.vocabulary, ignore_index)
        count = problem.labels.shape[0]
        grad = 1 / max(1, count) if reduction == "mean" else 1.0
        forming = _formable(needs, reduction, backend, weight.dtype, return_lse)
        gradients = _room(hidden, weight, bias, forming)
        if count == 0:
            statistics = _no_statistics(problem)
            for x in gradients:
                x.zero_()
        elif backend == "triton":
            from .triton import forward_triton

            statistics = forward_triton(problem, accuracy)
        else:
            into = Gradients(*(x if form else None for x, form in zip(gradients, forming, strict=True)))
            if into.hidden is not None:
                into.hidden.zero_()
            statistics = forward_blocked(problem, grad, into)
        losses = rule.losses(statistics)
        loss = spread(losses, problem) if reduction == "none" else losses.sum() * grad
        lse, log_probs = spread(statistics.lse, problem), spread(statistics.label - statistics.lse, problem)
        correct = _correct(statistics, problem, accuracy)
        return loss, lse, log_probs, correct, *gradients


@linear_cross_entropy_operator.register_fake
def _(hidden, weight, bias, labels, ignore_index, softcap, smoothing, z_loss, reduction, needs, accuracy, return_lse,
      check, backend):  # fmt: skip
    per_row = hidden.new_empty(hidden.shape[0], dtype=torch.promote_types(hidden.dtype, torch.float32))
    loss = torch.empty_like(per_row) if reduction == "none" else per_row.new_empty(())
    correct = labels.new_empty(hidden.shape[0] if accuracy else 0, dtype=torch.bool)
    gradients = _room(hidden, weight, bias, _formable(needs, reduction, backend, weight.dtype, return_lse))
    return loss, per_row, torch.empty_like(per_row), correct, *gradients


@torch.library.custom_op("llm2vec_fast::linear_cross_entropy_backward", mutates_args=())
def linear_cross_entropy_backward_operator(
    grad: Tensor,
    grad_lse: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    lse: Tensor,
    dhidden: Tensor,
    dweight: Tensor,
    dbias: Tensor,
    ignore_index: int,
    softcap: float,
    smoothing: float,
    z_loss: float,
    reduction: str,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias, from those that are not empty, for the upstream gradients ``grad`` of the
    loss, () or (T,), and ``grad_lse`` of the log-sum-exp, (T,)."""
    made, ready = _room(hidden, weight, bias, needs), (dhidden, dweight, dbias)
    formed = [x.numel() > 0 for x in ready]
    for out, x in zip(made, ready, strict=True):
        if x.numel():
            out.copy_(x)
    rule = (ignore_index, softcap, smoothing, z_loss, reduction)
    _finish(grad, grad_lse, hidden, weight, bias, labels, lse, made, formed, *rule, needs, backend)
    return made


@linear_cross_entropy_backward_operator.register_fake
def _(grad, grad_lse, hidden, weight, bias, labels, lse, dhidden, dweight, dbias, ignore_index, softcap, smoothing,
      z_loss, reduction, needs, backend):  # fmt: skip
    return _room(hidden, weight, bias, needs)


@torch.no_grad()
def _finish(
    grad: Tensor,
    grad_lse: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    lse: Tensor,
    gradients: Sequence[Tensor],
    formed: Sequence[bool],
    ignore_index: int,
    softcap: float,
    smoothing: float,
    z_loss: float,
    reduction: str,
    needs: list[bool],
    backend: str,
) -> None:
    """Bring the gradients that are ``formed`` to the upstream ``grad`` in place, and compute the others.

    None is formed where there is a ``grad_lse``.
    """
    missing: list[Tensor | None] = [None] * 3
    for i, ready in enumerate(formed):
        if needs[i] and not ready:
            missing[i] = gradients[i]
        elif needs[i] and not _is_one(grad):
            gradients[i].mul_(grad[:, None] if grad.ndim else grad)
    if all(x is None for x in missing):
        return
    with torch.autocast(hidden.device.type, enabled=False):
        rule = Rule(softcap or None, smoothing, z_loss, weight.shape[0])
        problem = labelled(hidden, weight, bias, labels, ignore_index, rule)
        count = problem.labels.shape[0]
        row_grad = grad.index_select(0, problem.rows) if grad.ndim else grad.expand(count)
        row_grad = row_grad / max(1, count) if reduction == "mean" else row_grad
        row_lse = lse.index_select(0, problem.rows)
        factor = rule.softmax_factor(row_grad, row_lse)
        if grad_lse is not None:
            factor = factor + grad_lse.index_select(0, problem.rows)
        compute_gradients(problem, row_lse, row_grad, factor, Gradients(*missing), backend)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, labels, ignore_index, softcap, smoothing, z_loss, reduction, needs, *_ = inputs
    return_lse, _, backend = inputs[-3:]
    _, lse, log_probs, correct, *gradients = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*(() if return_lse else (lse,)), log_probs, correct, *gradients)
    ctx.save_for_backward(hidden, weight, bias, labels, lse)
    # Not among the saved tensors, for the backward pass takes them over: it scales them in place.
    ctx.gradients = gradients
    ctx.rule = (ignore_index, softcap, smoothing, z_loss, reduction)
    ctx.needs, ctx.backend = needs, backend


def _backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None and grad_lse is None:
        return (None,) * 14
    hidden, weight, bias, labels, lse = ctx.saved_tensors
    if grad is None:
        grad = lse.new_zeros(())
    gradients = ctx.gradients
    if gradients is None:  # a second backward pass through the same graph computes them anew
        gradients = _room(hidden, weight, bias, [False] * 3)
    ctx.gradients = None
    settings = (*ctx.rule, ctx.needs, ctx.backend)
    if type(grad) is Tensor and type(grad_lse) in (Tensor, type(None)) and not torch.is_grad_enabled():
        formed = [x.numel() > 0 for x in gradients]
        fresh = _room(hidden, weight, bias, [need and not have for need, have in zip(ctx.needs, formed, strict=True)])
        gradients = [x if have else y for x, y, have in zip(gradients, fresh, formed, strict=True)]
        _finish(grad, grad_lse, hidden, weight, bias, labels, lse, gradients, formed, *settings)
    else:  # traced by a compiler, or to be differentiated again, which the operator refuses
        gradients = linear_cross_entropy_backward_operator(
            grad, grad_lse, hidden, weight, bias, labels, lse, *gradients, *settings
        )
    return *(x if need else None for x, need in zip(gradients, ctx.needs, strict=True)), *(None,) * 11


linear_cross_entropy_operator.register_autograd(_backward, setup_context=_setup_context)


def labelled(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int, rule: Rule, first: int = 0
) -> Problem:
    """The problem that is left when ignored rows are dropped; labels counted from entry ``first``."""
    rows = (labels != ignore_index).nonzero()[:, 0]
    return Problem(hidden, weight, bias, rows, labels.index_select(0, rows).long() - first, rule)


def refuse_wrong_labels(labels: Tensor, rows: Tensor, vocabulary: int, ignore_index: int) -> None:
    """Refuse labels (N,) outside 0 … vocabulary − 1.

    Raises:
        ValueError: names the first such label and its row.
    """
    wrong = ((labels < 0) | (labels >= vocabulary)).nonzero()
    if wrong.shape[0]:
        first = int(wrong[0])
        raise ValueError(
            f"labels[{int(rows[first])}] is {int(labels[first])}: labels are 0 … {vocabulary - 1}, "
            f"or {ignore_index} for rows to leave out"
        )


def compute_gradients(
    problem: Problem, lse: Tensor, grad: Tensor, factor: Tensor, gradients: Gradients, backend: str
) -> None:
    """Fill ``gradients`` from each labelled row's log-sum-exp, upstream gradient, and ``factor`` of the softmax in the
    gradient of its logits; all (N,)."""
    for x in (gradients.weight, gradients.bias) if problem.labels.shape[0] == 0 else ():
        if x is not None:
            x.zero_()
    if gradients.hidden is not None:
        gradients.hidden.zero_()
    if problem.labels.shape[0] == 0:
        return
    if backend == "triton":
        from .triton_backward import gradients_triton

        gradients_triton(problem, lse, grad, factor, gradients)
    else:
        gradients_blocked(problem, lse, grad, factor, gradients)


def spread(values: Tensor, problem: Problem) -> Tensor:
    """(N,) values of the labelled rows → (T,), zeros on the others."""
    return values.new_zeros(problem.hidden.shape[0]).index_copy_(0, problem.rows, values)


def _room(hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: Sequence[bool]) -> tuple[Tensor, ...]:
    """Memory for the gradients that are wanted, and nothing for the others."""
    sizes = (hidden.shape, weight.shape, weight.shape[:1])
    return tuple(weight.new_empty(size if want else 0) for size, want in zip(sizes, wanted, strict=True))


def _formable(needs: Sequence[bool], reduction: str, backend: str, dtype: torch.dtype, return_lse: bool) -> list[bool]:
    """Which gradients the forward pass may form: none on Triton, and what sums over rows only if all have one upstream
    gradient. None in float16 either, whose range is that of gradients only once the upstream one, a loss scale or one
    over the number of tokens, is in them; and none where the log-sum-exp may have a gradient, too."""
    forming = backend != "triton" and dtype != torch.float16 and not return_lse
    return [need and forming and (i == 0 or reduction != "none") for i, need in enumerate(needs)]


def _no_statistics(problem: Problem) -> Statistics:
    return Statistics(*problem.hidden.new_empty((4, 0), dtype=problem.accumulator))


def _correct(statistics: Statistics, problem: Problem, accuracy: bool) -> Tensor:
    """(T,) bool: the label's logit is the highest; nothing if not asked."""
    if not accuracy:
        return problem.labels.new_empty(0, dtype=torch.bool)
    return spread(statistics.label >= statistics.highest, problem)


def _is_one(grad: Tensor) -> bool:
    """Saves a pass over the gradients in the usual case; asking a GPU would make the host wait."""
    return grad.ndim == 0 and grad.device.type == "cpu" and float(grad) == 1.0
