"""The loss in plain PyTorch that never holds more than BLOCK_BYTES of logits, and is fast on a CPU.

Forward takes blocks of rows with the whole vocabulary: the softmax of a block is then complete, and its gradient can be
multiplied on at once. The gradient of `hidden` so costs one product more than the loss, as it does with all logits
kept; that of a float32 `weight` too, for it accumulates in place.

A 16-bit `weight` would need a float32 copy of its gradient to accumulate over blocks of rows. Where the rows do not
fit in one block, its gradient is instead made from blocks of the vocabulary with all rows, and every part of it is
written once, from a float32 accumulator. Until then its memory keeps the gradient of the logits of the first d rows;
the logits of the others are multiplied a second time.

On a CPU without instructions for the dtype every product is a widened one: PyTorch's own would hold the weight's
gradient in float32 at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..products import is_widened, widened_product
from .rule import Gradients, Problem, Rule, Statistics

# Logits held at once.
BLOCK_BYTES = 44 * 1024 * 1024
# Of these, as many elements as stay in cache are worked on at a time, in float32.
SLICE_ELEMENTS = 512 * 1024
COLUMNS_MULTIPLE = 64
# How much of a float32 weight one product takes: with few rows that is up to a fifth faster than all of it at once.
LOGITS_PANEL_BYTES = 4 * 1024 * 1024
HIDDEN_PANEL_BYTES = 16 * 1024 * 1024
# The gradient of this much of the hidden states is made at once, beside the logits.
HIDDEN_BYTES = 2 * 1024 * 1024


def forward_blocked(problem: Problem, grad: float, gradients: Gradients) -> Statistics:
    """Statistics of the labelled rows and, for the upstream gradient ``grad`` of every row, ``gradients``."""
    count, entries = problem.labels.shape[0], problem.weight.shape[0]
    step = max(1, BLOCK_BYTES // (entries * problem.weight.element_size()))
    buffer = problem.weight.new_empty((min(step, count), entries))
    weight_grad, slopes = gradients.weight, None
    if weight_grad is not None and problem.accumulator != weight_grad.dtype and step < count:
        slopes = _Slopes(weight_grad, min(count, weight_grad.shape[1]), _columns(count, buffer.numel()))
    hidden = None if slopes is None else problem.taken(slice(None))  # all at once in the end
    forming = any(x is not None for x in (gradients.hidden, weight_grad, gradients.bias))
    sums = problem.weight.new_zeros(entries, dtype=problem.accumulator) if gradients.bias is not None else None
    parts = []
    for first in range(0, count, step):
        block = slice(first, min(count, first + step))
        b_hidden = problem.taken(block) if hidden is None else hidden[block]
        b_logits = _multiply(b_hidden, problem.weight, problem.bias, buffer[: b_hidden.shape[0]])
        parts.append(_soften(b_logits, problem, problem.labels[block], forming))
        if gradients.hidden is not None:
            _form_hidden(b_logits, problem.weight, grad, gradients.hidden, problem.rows[block])
        if slopes is not None:
            slopes.keep(first, b_logits)
        elif weight_grad is not None:
            _add_weight(weight_grad, b_logits, b_hidden, grad, first > 0)
        if sums is not None:
            sums += b_logits.sum(0, dtype=sums.dtype)
    if gradients.bias is not None:
        gradients.bias.copy_(sums.mul_(grad))
    statistics = Statistics.joined(parts)
    if slopes is not None:
        _finish_weight(slopes, problem, hidden, statistics.lse, grad, buffer.view(-1))
    return statistics


@dataclass(frozen=True)
class _Slopes:
    """The gradient of the logits of the first ``rows`` rows, in the memory of the weight's gradient (V, d).

    The part of the latter that belongs to a block of v entries has room for (rows, v) of them, as rows ≤ d.
    """

    weight_grad: Tensor
    rows: int
    columns: int

    def blocks(self) -> list[slice]:
        """The vocabulary in blocks of ``columns``."""
        entries = self.weight_grad.shape[0]
        return [slice(first, min(entries, first + self.columns)) for first in range(0, entries, self.columns)]

    def of(self, block: slice) -> Tensor:
        """(rows, v): those of a block."""
        v = block.stop - block.start
        return self.weight_grad[block].view(-1)[: self.rows * v].view(self.rows, v)

    def keep(self, first: int, b_slopes: Tensor) -> None:
        """Keep what there is room for of (n, V), whose first row is row ``first``."""
        kept = b_slopes[: max(0, self.rows - first)]
        for block in self.blocks() if kept.shape[0] else ():
            self.of(block)[first : first + kept.shape[0]] = kept[:, block]


def _finish_weight(slopes: _Slopes, problem: Problem, hidden: Tensor, lse: Tensor, grad: float, buffer: Tensor) -> None:
    """The slopes become the weight's gradient, those of the rows (N, d) that are not kept computed again."""
    count, kept = hidden.shape[0], slopes.rows
    if buffer.shape[0] < count * slopes.columns:
        buffer = buffer.new_empty(count * slopes.columns)
    lse, ones = lse[kept:], torch.ones_like(lse[kept:])
    factor = problem.rule.softmax_factor(ones, lse)
    for block in slopes.blocks():
        b_kept = slopes.of(block)
        b_slopes = buffer[: count * b_kept.shape[1]].view(count, -1)
        b_slopes[:kept] = b_kept
        if kept < count:
            b_bias = None if problem.bias is None else problem.bias[block]
            b_logits = _multiply(hidden[kept:], problem.weight[block], b_bias, b_slopes[kept:])
            _slope(b_logits, problem, problem.labels[kept:] - block.start, lse, ones, factor)
        _add_weight(slopes.weight_grad[block], b_slopes, hidden, grad, False)


def gradients_blocked(problem: Problem, lse: Tensor, grad: Tensor, factor: Tensor, gradients: Gradients) -> None:
    """Gradients from what `compute_gradients` is given of each row: blocks of the vocabulary, all rows."""
    hidden, entries = problem.taken(slice(None)), problem.weight.shape[0]
    count = hidden.shape[0]
    step = min(entries, _columns(count, BLOCK_BYTES // hidden.element_size()))
    buffer = hidden.new_empty(count * step)
    total = hidden.new_zeros(hidden.shape, dtype=problem.accumulator) if gradients.hidden is not None else None
    for first in range(0, entries, step):
        block = slice(first, min(entries, first + step))
        b_weight = problem.weight[block]
        b_bias = None if problem.bias is None else problem.bias[block]
        b_logits = buffer[: count * b_weight.shape[0]].view(count, b_weight.shape[0])
        _multiply(hidden, b_weight, b_bias, b_logits)
        _slope(b_logits, problem, problem.labels - first, lse, grad, factor)
        if gradients.weight is not None:
            _add_weight(gradients.weight[block], b_logits, hidden, 1.0, False)
        if gradients.bias is not None:
            gradients.bias[block] = b_logits.sum(0, dtype=problem.accumulator)
        if total is not None and is_widened(b_weight):
            widened_product(b_logits, b_weight, total, add=True)
        elif total is not None:
            total += b_logits @ b_weight
    if gradients.hidden is not None:
        gradients.hidden.index_copy_(0, problem.rows, total.to(gradients.hidden.dtype))


def _columns(count: int, elements: int) -> int:
    """How much of the vocabulary is multiplied with so many rows at once, in room for so many elements."""
    return max(COLUMNS_MULTIPLE, elements // count // COLUMNS_MULTIPLE * COLUMNS_MULTIPLE)


def _multiply(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """hidden · weightᵀ + bias, into memory that is already there: fresh memory costs a page fault every 4 KiB."""
    if is_widened(weight):
        widened_product(hidden, weight.T, out, bias=bias)
        return out
    for panel in _panels(weight, LOGITS_PANEL_BYTES):
        if bias is None:
            torch.mm(hidden, weight[panel].T, out=out[:, panel])
        else:
            torch.addmm(bias[panel], hidden, weight[panel].T, out=out[:, panel])
    return out


def _multiply_on(b_logits: Tensor, weight: Tensor) -> Tensor:
    """The gradient of the logits (n, V) · weight."""
    if is_widened(weight):
        out = b_logits.new_empty(b_logits.shape[0], weight.shape[1])
        widened_product(b_logits, weight, out)
        return out
    panels = _panels(weight, HIDDEN_PANEL_BYTES)
    out = b_logits[:, panels[0]] @ weight[panels[0]]
    for panel in panels[1:]:
        torch.addmm(out, b_logits[:, panel], weight[panel], out=out)
    return out


def _add_weight(out: Tensor, b_slopes: Tensor, hidden: Tensor, grad: float, add: bool) -> None:
    """Write the gradient of a weight (v, d), or ``add`` it, from that of the logits (n, v) and the rows (n, d)."""
    if is_widened(out):
        widened_product(b_slopes.T, hidden, out, scale=grad, add=add)
    else:
        torch.addmm(out, b_slopes.T, hidden, beta=1 if add else 0, alpha=grad, out=out)


def _form_hidden(b_slopes: Tensor, weight: Tensor, grad: float, out: Tensor, rows: Tensor) -> None:
    """Write the gradient of some ``rows`` of the hidden states, HIDDEN_BYTES at once, from that of their logits."""
    step = max(1, HIDDEN_BYTES // (weight.shape[1] * weight.element_size()))
    for first in range(0, b_slopes.shape[0], step):
        part = slice(first, first + step)
        out.index_copy_(0, rows[part], _multiply_on(b_slopes[part], weight).mul_(grad))


def _panels(weight: Tensor, size: int) -> list[slice]:
    """The parts of a weight that one product takes: all of a 16-bit one, panels that fit in cache of another."""
    entries, width = weight.shape
    step = entries if weight.element_size() < 4 else max(1, size // (width * weight.element_size()))
    return [slice(first, first + step) for first in range(0, weight.shape[0], step)]


def _soften(b_logits: Tensor, problem: Problem, labels: Tensor, forming: bool) -> Statistics:
    """The statistics of whole rows of logits (n, V), which become their own gradient if ``forming``."""
    rule = problem.rule
    here = (labels >= 0) & (labels < b_logits.shape[1])
    column = labels.where(here, 0)[:, None]
    parts = []
    for rows, b_x in _slices(b_logits, problem.accumulator):
        b_slope = _bend(b_x, rule, forming)
        label = b_x.gather(1, column[rows])[:, 0].where(here[rows], float("nan"))
        total = b_x.sum(1) if rule.smoothing else None
        highest = b_x.amax(1)
        torch.softmax(b_x, 1, out=b_x)
        # The highest logit's weight is 1 / Σ exp(x − highest). PyTorch's softmax takes this sum one element after the
        # other, which over 262,144 of them costs three digits; the sum of its results, taken in pairs, restores them.
        error = b_x.sum(1)
        lse = highest - (b_x.amax(1) / error).log()
        parts.append(Statistics(lse, label, total, highest))
        if forming:
            b_x.mul_((rule.softmax_factor(torch.ones_like(lse), lse) / error)[:, None])
            if rule.smoothing:
                b_x.sub_(rule.smoothing / rule.vocabulary)
            b_logits[rows] = b_x if b_slope is None else b_x.mul_(b_slope)
    statistics = Statistics.joined(parts)
    if forming:
        ones = torch.ones_like(statistics.lse)
        factor = rule.softmax_factor(ones, statistics.lse)
        _set_labels(b_logits, labels, statistics.label, statistics.lse, ones, factor, rule)
    return statistics


def _slope(b_logits: Tensor, problem: Problem, labels: Tensor, lse: Tensor, grad: Tensor, factor: Tensor) -> None:
    """A block of logits (N, v), whose first entry has label 0, becomes its own gradient."""
    rule = problem.rule
    shift = lse - factor.abs().log()  # the factor in the exponent costs no pass of its own
    signs = factor.sign() if bool((factor < 0).any()) else None
    here = (labels >= 0) & (labels < b_logits.shape[1])
    label = b_logits.gather(1, labels.where(here, 0)[:, None])[:, 0].to(lse.dtype)
    _bend(label, rule, False)
    for rows, b_x in _slices(b_logits, problem.accumulator):
        b_slope = _bend(b_x, rule, True)
        b_x.sub_(shift[rows, None]).exp_()
        if signs is not None:
            b_x.mul_(signs[rows, None])
        if rule.smoothing:
            b_x.sub_((grad[rows] * (rule.smoothing / rule.vocabulary))[:, None])
        b_logits[rows] = b_x if b_slope is None else b_x.mul_(b_slope)
    _set_labels(b_logits, labels, label, lse, grad, factor, rule)


def _set_labels(
    b_logits: Tensor, labels: Tensor, label: Tensor, lse: Tensor, grad: Tensor, factor: Tensor, rule: Rule
) -> None:
    """Write the gradient of each label's own logit, made in full precision: p − 1 must not cancel in 16 bits."""
    rows = ((labels >= 0) & (labels < b_logits.shape[1])).nonzero()[:, 0]
    label, lse, grad = label[rows], lse[rows], grad[rows]
    value = factor[rows] * (label - lse).exp()
    value -= grad * (1 - rule.smoothing + rule.smoothing / rule.vocabulary)
    if rule.softcap is not None:
        value *= 1 - (label / rule.softcap).square()
    b_logits[rows, labels[rows]] = value.to(b_logits.dtype)


def _bend(b_x: Tensor, rule: Rule, keep: bool) -> Tensor | None:
    """Apply softcap in place; its slope if asked to ``keep`` it."""
    if rule.softcap is None:
        return None
    b_x.div_(rule.softcap).tanh_()
    b_slope = 1 - b_x.square() if keep else None
    b_x.mul_(rule.softcap)
    return b_slope


def _slices(b_logits: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Rows of the block, a cacheful at a time, in ``dtype``: the logits themselves, or a copy in scratch memory."""
    step = max(1, SLICE_ELEMENTS // b_logits.shape[1])
    scratch = None if b_logits.dtype == dtype else b_logits.new_empty((step, b_logits.shape[1]), dtype=dtype)
    for first in range(0, b_logits.shape[0], step):
        rows = slice(first, first + step)
        b_x = b_logits[rows]
        yield rows, b_x if scratch is None else scratch[: b_x.shape[0]].copy_(b_x)
