"""Attention in plain PyTorch, lean in memory and fast on a CPU.

Sequences of equal length share one batched matrix product: a forward pass over short texts makes a handful of calls a
layer instead of one a text. Each product is cut into blocks of queries so that the scores of a block stay in cache and
never grow with the square of a text's length.

Without gradients a sequence is padded to the next multiple of a few tokens, which depends on nothing but its own
length, so that its result is the same to the last bit whatever shares its batch. With gradients, where batches are
shuffled and lengths seldom equal, sequences of near-equal length are padded into one call.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..layout import SequenceLayout
from .dropout import Dropout

# Scores held at once. On 2 Zen 5 cores 0.5 to 2 MiB ran alike and 8 MiB, past the level-2 caches, half as fast.
BLOCK_SCORES = 512 * 1024
QUERY_BLOCK = 256
# Without gradients, sequences of up to PADDED_LENGTH tokens are padded to a multiple of this. Besides fewer and more
# even products that is fewer shapes, and oneDNN keeps half a MiB of generated code for every shape it has met.
LENGTH_STEP = 16
# With gradients, sequences share a padded call while padding stays below this part of it, up to this length.
PADDING_SHARE = 0.15
PADDED_LENGTH = 512
# As many layouts can be in use at once as there are cores, each with a batch of its own.
LAYOUTS_KEPT = 256


@dataclass(frozen=True)
class _Group:
    """Sequences that run as one (count, length) batch; ``rows`` finds them in the flat batch."""

    count: int
    length: int
    rows: slice | Tensor
    tokens: Tensor | None  # (tokens,) positions within count·length that are real; None: all of them
    unpadded: int  # keys that are real in every sequence
    pad_keys: Tensor | None  # (count, 1, 1, length − unpadded) bool, True on padding; None: none
    sequences: Tensor  # (count,) their numbers in the layout


def attention_blocked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: SequenceLayout,
    *,
    causal: bool,
    window: int | None,
    softcap: float | None,
    scale: float,
    dropout: Dropout | None = None,
) -> Tensor:
    """q (T, Hq, D), k and v (T, Hkv, D) → (T, Hq, D); zeros on rows of no sequence. Differentiable by autograd."""
    exact = not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad))
    groups = _groups(layout, exact)
    rule = _Rule(causal, window, softcap, scale, dropout)
    if len(groups) == 1 and groups[0].rows == slice(0, q.shape[0]):
        return _attend(*(_take(x, groups[0]) for x in (q, k, v)), groups[0], rule).flatten(0, 1)
    outputs = [_real(_attend(*(_take(x, group) for x in (q, k, v)), group, rule), group) for group in groups]
    if not outputs:
        return torch.zeros_like(q) + (q.sum() + k.sum() + v.sum()) * 0
    rows = _output_rows(layout, exact)
    joined = torch.cat(outputs)
    if layout.total == joined.shape[0]:
        return joined if rows is None else joined.index_select(0, rows)
    return joined.new_zeros(q.shape).index_copy(0, rows, joined)


@dataclass(frozen=True)
class _Rule:
    """Which keys a query sees, and how its scores are made."""

    causal: bool
    window: int | None
    softcap: float | None
    scale: float
    dropout: Dropout | None

    def keys(self, first: int, last: int, length: int) -> tuple[int, int]:
        """The key range that queries first … last − 1 can see."""
        low = 0 if self.window is None else max(0, first - self.window)
        high = last if self.causal else length if self.window is None else min(length, last + self.window)
        return low, high

    def hidden(self, first: int, last: int, low: int, high: int, device: torch.device) -> Tensor | None:
        """(queries, keys) bool, True where a key in range is out of sight; None where every one is seen."""
        widest = max(last - 1 - low, high - 1 - first)
        if not self.causal and (self.window is None or widest <= self.window):
            return None
        distance = torch.arange(first, last, device=device)[:, None] - torch.arange(low, high, device=device)
        hidden = distance < 0 if self.causal else torch.zeros_like(distance, dtype=torch.bool)
        return hidden if self.window is None else hidden | (distance.abs() > self.window)


def _attend(q: Tensor, k: Tensor, v: Tensor, group: _Group, rule: _Rule) -> Tensor:
    """q (N, L, Hq, D), k and v (N, L, Hkv, D) → (N, L, Hq, D)."""
    count, length, q_heads, width = q.shape
    kv_heads = k.shape[2]
    shared = q_heads // kv_heads
    # (N, Hkv, g, L, D) and (N, Hkv, L, D)
    q = q.view(count, length, kv_heads, shared, width).permute(0, 2, 3, 1, 4)
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    per_step = max(1, BLOCK_SCORES // max(1, q_heads * min(length, QUERY_BLOCK) * length))
    steps = [slice(i, min(count, i + per_step)) for i in range(0, count, per_step)]
    parts = [_attend_step(q[step], k[step], v[step], group, step, rule) for step in steps]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _attend_step(q: Tensor, k: Tensor, v: Tensor, group: _Group, step: slice, rule: _Rule) -> Tensor:
    """q (n, Hkv, g, L, D), k and v (n, Hkv, L, D) → (n, L, Hkv·g, D), a block of queries at a time."""
    length = q.shape[3]
    if length <= QUERY_BLOCK:
        return _attend_block(q, k, v, group, step, rule, 0)
    blocks = [
        _attend_block(q[:, :, :, first : first + QUERY_BLOCK], k, v, group, step, rule, first)
        for first in range(0, length, QUERY_BLOCK)
    ]
    return torch.cat(blocks, dim=1)


def _attend_block(q: Tensor, k: Tensor, v: Tensor, group: _Group, step: slice, rule: _Rule, first: int) -> Tensor:
    """Queries ``first`` … of each sequence against every key they can see."""
    count, kv_heads, shared, queries, width = q.shape
    low, high = rule.keys(first, first + queries, k.shape[2])
    k, v = k[:, :, low:high].flatten(0, 1), v[:, :, low:high].flatten(0, 1)
    rows = q.reshape(count * kv_heads, shared * queries, width)
    scores = torch.baddbmm(rows.new_empty(()), rows, k.transpose(1, 2), beta=0, alpha=rule.scale)
    if rule.softcap is not None:
        scores = torch.tanh(scores / rule.softcap) * rule.softcap
    scores = scores.view(count, kv_heads * shared, queries, high - low)
    hidden = rule.hidden(first, first + queries, low, high, q.device)
    if hidden is not None:
        scores = scores.masked_fill(hidden, float("-inf"))
    if group.pad_keys is not None and high > group.unpadded:
        begin = max(low, group.unpadded)
        padding = group.pad_keys[step, ..., begin - group.unpadded : high - group.unpadded]
        # Finite: a padding query whose window holds padding alone must not become NaN, which gradients would spread.
        scores[..., begin - low :].masked_fill_(padding, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, dim=-1)
    if rule.dropout is not None:
        heads = torch.arange(kv_heads * shared, device=q.device)
        positions = torch.arange(first, first + queries, device=q.device)
        factors = rule.dropout.factors(group.sequences[step], heads, positions, low, high)
        weights = weights * factors.to(weights.dtype)
    out = torch.bmm(weights.view(count * kv_heads, shared * queries, high - low), v).view(
        count, kv_heads, shared, queries, width
    )
    return out.permute(0, 3, 1, 2, 4).reshape(count, queries, kv_heads * shared, width)


def _take(x: Tensor, group: _Group) -> Tensor:
    rows = x[group.rows] if isinstance(group.rows, slice) else x.index_select(0, group.rows)
    return rows.unflatten(0, (group.count, group.length))


def _real(out: Tensor, group: _Group) -> Tensor:
    flat = out.flatten(0, 1)
    return flat if group.tokens is None else flat.index_select(0, group.tokens)


@lru_cache(maxsize=LAYOUTS_KEPT)
def _groups(layout: SequenceLayout, exact: bool) -> tuple[_Group, ...]:
    """Made once a layout: every layer of a forward pass asks with the same one."""
    return tuple(_make_group(layout, members, exact) for members in _members(layout, exact))


@lru_cache(maxsize=LAYOUTS_KEPT)
def _output_rows(layout: SequenceLayout, exact: bool) -> Tensor | None:
    """Where the groups' outputs, joined, belong; None where they already are in order.

    For a packed batch the inverse permutation (a gather is faster than a scatter), else the target rows.
    """
    starts, lengths = layout.starts.tolist(), layout.lengths.tolist()
    order = [i for members in _members(layout, exact) for i in members]
    targets = torch.cat([torch.arange(starts[i], starts[i] + lengths[i], device="cpu") for i in order])
    if targets.numel() < layout.total:
        return targets.to(layout.device)
    if torch.equal(targets, torch.arange(layout.total, device="cpu")):
        return None
    return targets.argsort().to(layout.device)


@lru_cache(maxsize=LAYOUTS_KEPT)
def _members(layout: SequenceLayout, exact: bool) -> tuple[tuple[int, ...], ...]:
    """Sequence numbers by group: longest first, equal or near-equal lengths together, empty sequences left out."""
    lengths = layout.lengths.tolist()
    order = sorted((i for i, n in enumerate(lengths) if n), key=lambda i: (-lengths[i], i))
    groups: list[list[int]] = []
    tokens = 0
    for i in order:
        longest = lengths[groups[-1][0]] if groups else 0
        if exact:
            fits = _padded_length(lengths[i]) == _padded_length(longest)
        else:
            fits = lengths[i] == longest or _may_pad(longest, len(groups[-1]) + 1 if groups else 1, tokens + lengths[i])
        if groups and fits:
            groups[-1].append(i)
            tokens += lengths[i]
        else:
            groups.append([i])
            tokens = lengths[i]
    return tuple(tuple(sorted(group)) for group in groups)


def _may_pad(longest: int, count: int, tokens: int) -> bool:
    return longest <= PADDED_LENGTH and count * longest - tokens <= PADDING_SHARE * count * longest


def _padded_length(length: int) -> int:
    return -(-length // LENGTH_STEP) * LENGTH_STEP if length <= PADDED_LENGTH else length


def _make_group(layout: SequenceLayout, members: tuple[int, ...], exact: bool) -> _Group:
    sequences = torch.tensor(members, device="cpu")
    starts, lengths = layout.starts.cpu().long()[sequences], layout.lengths.cpu().long()[sequences]
    sequences = sequences.to(layout.device)
    count, shortest, longest = len(members), int(lengths.min()), int(lengths.max())
    longest = _padded_length(longest) if exact else longest
    if shortest == longest:
        first = int(starts[0])
        if torch.equal(starts, first + torch.arange(count, device="cpu") * longest):
            return _Group(count, longest, slice(first, first + count * longest), None, longest, None, sequences)
        rows = (starts[:, None] + torch.arange(longest, device="cpu")).flatten()
        return _Group(count, longest, rows.to(layout.device), None, longest, None, sequences)
    positions = torch.arange(longest, device="cpu")
    real = positions < lengths[:, None]
    rows = starts[:, None] + positions.minimum(lengths[:, None] - 1)  # padding repeats the last token
    return _Group(
        count,
        longest,
        rows.flatten().to(layout.device),
        real.flatten().nonzero().flatten().to(layout.device),
        shortest,
        ~real[:, None, None, shortest:].to(layout.device),
        sequences,
    )
