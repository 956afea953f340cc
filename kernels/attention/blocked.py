"""Attention in plain PyTorch, lean in memory and fast on a CPU, forward and backward.

Sequences of equal length share one batched matrix product. Each product is cut into blocks of queries so that the
scores of a block stay in cache and never grow with the square of a text's length; the backward pass computes them again
instead of keeping them.

Without gradients a sequence is padded to the next multiple of a few tokens, which depends on nothing but its own
length, so that its result is the same to the last bit whatever shares its batch. With gradients, where batches are
shuffled and lengths seldom equal, sequences of near-equal length are padded into one call. Long sequences in float32
run through PyTorch's own flash attention for CPUs, see `cpu_flash`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import cpu_flash
from .dropout import Dropout, drop_
from .grouping import QUERY_BLOCK, Group, Plan, plan
from .products import product, runs_alone

# Scores held at once, which several passes read. On Zen 5 cores with 1 MiB of level-2 cache each, float32 ran fastest
# with 32 to 128 Ki (a quarter slower with 1 Mi), bfloat16 with 128 to 512 Ki, whose fewer calls cost oneDNN less; so
# it is for float32 where oneDNN takes the products. Dropout makes fifty short calls a block.
BLOCK_SCORES = {torch.float32: 128 * 1024, torch.float64: 32 * 1024}
BLOCK_SCORES_DROPOUT = 256 * 1024
BLOCK_SCORES_ONEDNN = 512 * 1024
# Below this many queries a product is too flat to run fast; a long sequence's scores then exceed the budget.
LEAST_QUERIES = 32


def blocked_forward(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, lengths: Tensor, rule: Rule, *, training: bool, with_lse: bool
) -> tuple[Tensor, Tensor]:
    """Output (T, Hq, D) and log-sum-exp (T, Hq), zeros and −inf on rows in no sequence.

    ``training`` allows sequences of near-equal length to share a call, and prepares for `blocked_backward`. Without
    ``with_lse`` the log-sum-exp is there only where that needs it.
    """
    made = _plan(q, k, starts, lengths, rule, training)
    results = ((run, cpu_flash.forward(q, k, v, run, rule, with_gradient=training)) for run in made.runs)
    if made.is_one_run:
        return next(results)[1]
    out = (torch.empty if made.full else torch.zeros)(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.full(q.shape[:2], float("-inf"), dtype=accumulator(q.dtype), device=q.device)
    for run, (part, sums) in results:
        out[run.rows] = part
        if training or with_lse:
            lse[run.rows] = sums
    if made.groups:
        q, k, v, out_by_head, lse_by_head = (_by_key_head(x, k.shape[1]) for x in (q, k, v, out, lse))
    for group in made.groups:
        part, sums = _Step(*map(group.take, (q, k, v)), group, rule).forward(with_lse)
        group.put(part, out_by_head)
        if sums is not None:
            group.put(sums, lse_by_head)
    return out, lse


def blocked_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, starts: Tensor, lengths: Tensor, rule: Rule
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, in their shapes and dtype, from the gradient of the output and what forward returned."""
    made = _plan(q, k, starts, lengths, rule, training=True)
    results = ((run, cpu_flash.backward(grad, q, k, v, out, lse, run, rule)) for run in made.runs)
    if made.is_one_run:
        return next(results)[1]
    new = torch.empty if made.full else torch.zeros
    gradients = [new(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    for run, parts in results:
        for part, whole in zip(parts, gradients, strict=True):
            whole[run.rows] = part
    if made.groups:
        grad, q, k, v, *by_head = (_by_key_head(x, k.shape[1]) for x in (grad, q, k, v, *gradients))
    for group in made.groups:
        step = _Step(*map(group.take, (q, k, v)), group, rule)
        for part, whole in zip(step.backward(group.take(grad)), by_head, strict=True):
            group.put(part, whole)
    dq, dk, dv = gradients
    return dq, dk, dv


def _plan(q: Tensor, k: Tensor, starts: Tensor, lengths: Tensor, rule: Rule, training: bool) -> Plan:
    runs = cpu_flash.lengths(q, k.shape[1], rule, training)
    return plan(starts, lengths, q.shape[0], training, q.shape[1], k.shape[1], _budget(q.dtype, rule), runs)


def _budget(dtype: torch.dtype, rule: Rule) -> int:
    budget = BLOCK_SCORES.get(dtype, BLOCK_SCORES_ONEDNN)
    return budget if rule.dropout is None else max(budget, BLOCK_SCORES_DROPOUT)


@dataclass(frozen=True)
class Rule:
    """Which keys a query sees, how its scores are made, and what is dropped: the same forward and backward."""

    causal: bool
    window: int | None
    softcap: float | None
    scale: float
    dropout: Dropout | None

    @classmethod
    def of(cls, causal: bool, window: int, softcap: float, scale: float, threshold: int, seed: Tensor | None) -> Rule:
        dropout = Dropout(threshold, int(seed)) if threshold else None
        return cls(causal, None if window < 0 else window, softcap or None, scale, dropout)

    @property
    def gain(self) -> float:
        """What dropout scales up the weights by that stay."""
        return 1.0 if self.dropout is None else self.dropout.gain

    def keys(self, first: int, last: int, length: int) -> tuple[int, int]:
        """The key range that queries first … last − 1 can see."""
        low = 0 if self.window is None else max(0, first - self.window)
        high = last if self.causal else length if self.window is None else min(length, last + self.window)
        return low, high

    def bias(self, first: int, last: int, low: int, high: int, like: Tensor) -> Tensor | None:
        """(queries, 1, keys): −inf where a key in range is out of sight, else 0; None where every one is seen."""
        widest = max(last - 1 - low, high - 1 - first)
        if not self.causal and (self.window is None or widest <= self.window):
            return None
        distance = torch.arange(first, last, device=like.device)[:, None] - torch.arange(low, high, device=like.device)
        hidden = distance < 0 if self.causal else torch.zeros_like(distance, dtype=torch.bool)
        if self.window is not None:
            hidden = hidden | (distance.abs() > self.window)
        return _bias(hidden, like)[:, None]


class _Step:
    """One group's rows, heads first: a batch of (key head, sequence) pairs.

    The query heads that share a key head lie side by side in the rows of q, (position, member), so that one product
    serves them all.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, group: Group, rule: Rule) -> None:
        """q (Hkv, n·L, g·D), k and v (Hkv, n·L, D)."""
        self.kv_heads, _, width = k.shape
        self.shared = q.shape[2] // width
        self.group, self.rule = group, rule
        # (Hkv·n, L·g, D) and (Hkv·n, L, D)
        self.q, self.k, self.v = (x.reshape(self.kv_heads * group.count, -1, width).contiguous() for x in (q, k, v))

    def forward(self, with_lse: bool) -> tuple[Tensor, Tensor | None]:
        """(Hkv, n·L, g·D) and, if asked for, the log-sum-exp (Hkv, n·L, g)."""
        blocks = list(self._blocks())
        out = torch.empty_like(self.q) if len(blocks) > 1 else None
        lse = self.q.new_empty(self.q.shape[:2], dtype=accumulator(self.q.dtype)) if with_lse else None
        for block in blocks:
            scores, _ = self._scores(block)
            if lse is not None:
                lse[block.batch, block.rows] = torch.logsumexp(scores.to(lse.dtype), dim=-1)
            weights = torch.softmax(scores, dim=-1, out=scores)
            if self.rule.dropout is not None:
                drop_(weights, self._kept(block))
            part = product(weights, self.v[block.batch, block.keys], self.rule.gain)
            if out is None:
                out = part
            else:
                out[block.batch, block.rows] = part
        return self._by_head(out), None if lse is None else self._by_head(lse)

    def backward(self, grad: Tensor) -> Iterator[Tensor]:
        """dQ (Hkv, n·L, g·D), dK and dV (Hkv, n·L, D) from the gradient of the output, like dQ."""
        grad = grad.reshape(self.q.shape).contiguous()
        if self.group.padding is not None:
            by_row = grad.view(self.kv_heads, *self.group.padding.shape, -1)
            grad = by_row.masked_fill(self.group.padding[..., None], 0).view(self.q.shape)
        dq = torch.empty_like(self.q)
        # (Hkv·n, D, L): the large factor of their products is then read as it lies in memory.
        dk, dv = (x.new_zeros(x.transpose(1, 2).shape, dtype=accumulator(x.dtype)) for x in (self.k, self.v))
        for block in self._blocks():
            self._add_block(block, grad[block.batch, block.rows], dq, dk, dv)
        return (self._by_head(x.to(self.q.dtype).contiguous()) for x in (dq, dk.transpose(1, 2), dv.transpose(1, 2)))

    def _add_block(self, block: _Block, grad: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
        scores, slope = self._scores(block, with_slope=True)
        weights = kept = torch.softmax(scores, dim=-1, out=scores)
        d_weights = product(grad, self.v[block.batch, block.keys].transpose(1, 2), self.rule.gain)
        if self.rule.dropout is not None:
            mask = self._kept(block)
            kept = drop_(weights.clone(), mask)
            drop_(d_weights, mask)
        dv[block.batch, :, block.keys] += product(grad.transpose(1, 2), kept, self.rule.gain)
        d_scores = torch.ops.aten._softmax_backward_data.out(
            d_weights, weights, -1, weights.dtype, grad_input=d_weights
        )
        if slope is not None:
            d_scores *= slope
        dq[block.batch, block.rows] = product(d_scores, self.k[block.batch, block.keys], self.rule.scale)
        q = self.q[block.batch, block.rows]
        dk[block.batch, :, block.keys] += product(q.transpose(1, 2), d_scores, self.rule.scale)

    def _blocks(self) -> Iterator[_Block]:
        """All of a group that fits the budget at once; a long sequence some heads and queries at a time."""
        length, batch = self.group.length, self.q.shape[0]
        queries = min(length, QUERY_BLOCK)
        reach = length if self.rule.window is None else min(length, queries + 2 * self.rule.window)
        if self.group.count == 1:
            budget = _budget(self.q.dtype, self.rule)
            batch = min(batch, max(1, budget // (self.shared * queries * reach)))
            if runs_alone(self.q, self.shared * queries * reach * self.q.shape[2]):
                budget, batch = BLOCK_SCORES_ONEDNN, 1
            queries = min(queries, max(LEAST_QUERIES, budget // (self.shared * batch * reach)))
        queries = -(-length // -(-length // queries))  # as many blocks, but even ones
        for start in range(0, self.q.shape[0], batch):
            for first in range(0, length, queries):
                last = min(first + queries, length)
                low, high = self.rule.keys(first, last, length)
                yield _Block(slice(start, min(start + batch, self.q.shape[0])), first, last, low, high, self.shared)

    def _scores(self, block: _Block, with_slope: bool = False) -> tuple[Tensor, Tensor | None]:
        """(batch, queries·g, keys), −inf where a key is out of sight, and what softcap multiplies their gradient by."""
        k = self.k[block.batch, block.keys]
        scores = product(self.q[block.batch, block.rows], k.transpose(1, 2), self.rule.scale)
        slope = None
        if self.rule.softcap is not None:
            scores = scores.div_(self.rule.softcap).tanh_()
            slope = 1 - scores.square() if with_slope else None
            scores *= self.rule.softcap
        grid = scores.unflatten(1, (-1, self.shared))
        bias = self.rule.bias(block.first, block.last, block.low, block.high, scores)
        if bias is not None:
            grid += bias
        if self.group.padding is not None and block.high > self.group.unpadded:
            begin = max(block.low, self.group.unpadded)
            padding = self.group.padding[:, None, begin : block.high]
            # Finite: a padding query whose window holds padding alone must not be NaN, which gradients would spread.
            by_sequence = scores.unflatten(0, (-1, self.group.count))
            by_sequence[..., begin - block.low :].masked_fill_(padding, torch.finfo(scores.dtype).min)
        return scores, slope

    def _kept(self, block: _Block) -> Tensor:
        """Which weights stay, as `drop_` takes it."""
        device, count = self.q.device, self.group.count
        first, last = block.batch.start // count * self.shared, block.batch.stop // count * self.shared
        # (heads of k, sequences, queries, heads of q that share one of k, keys)
        return self.rule.dropout.kept(
            self.group.sequences[:, None, None, None],
            torch.arange(first, last, device=device).view(-1, 1, 1, self.shared, 1),
            torch.arange(block.first, block.last, device=device)[:, None, None],
            block.low,
            block.high,
        )

    def _by_head(self, x: Tensor) -> Tensor:
        """(Hkv·n, L·m, …) → (Hkv, n·L, …)."""
        return x.view(self.kv_heads, self.group.count * self.group.length, -1)


@dataclass(frozen=True)
class _Block:
    """Some (key head, sequence) pairs, their queries first … last − 1, and the keys low … high − 1 those can see."""

    batch: slice
    first: int
    last: int
    low: int
    high: int
    shared: int

    @property
    def rows(self) -> slice:
        return slice(self.first * self.shared, self.last * self.shared)

    @property
    def keys(self) -> slice:
        return slice(self.low, self.high)


def _by_key_head(x: Tensor, kv_heads: int) -> Tensor:
    """(T, H, D) → (T, Hkv, g·D) contiguous, the query heads of one key head side by side."""
    return x.unflatten(1, (kv_heads, -1)).flatten(2).contiguous()


def _bias(hidden: Tensor, like: Tensor) -> Tensor:
    return torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(hidden, float("-inf"))


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64: what sums are kept in."""
    return torch.promote_types(dtype, torch.float32)
