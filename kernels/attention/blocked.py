"""Attention in plain PyTorch, lean in memory and fast on a CPU.

Sequences of near-equal length share one batched matrix product: a forward pass over 1,500 short texts makes a handful
of calls a layer instead of 1,500. Each product is cut into blocks of heads and queries so that the scores of a block
stay in cache and never grow with the square of a text's length.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..layout import SequenceLayout

# Scores held at once. On 2 Zen 5 cores 0.5 to 2 MiB ran alike and 8 MiB, past the level-2 caches, half as fast.
BLOCK_SCORES = 512 * 1024
QUERY_BLOCK = 256
# Sequences share a padded call while their shared padding stays below this part of the call.
PADDING_SHARE = 0.15
# Past this length equal treatment saves nothing: each length runs unpadded.
PADDED_LENGTH = 512


@dataclass(frozen=True)
class _Group:
    """Sequences that run as one (count, length) batch; ``rows`` finds them in the flat batch."""

    count: int
    length: int
    rows: slice | Tensor
    tokens: Tensor | None  # (tokens,) positions within count·length that are real; None: all of them
    pad_keys: Tensor | None  # (count, 1, 1, length) bool, True on padding; None: none


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
) -> Tensor:
    """q (T, Hq, D), k and v (T, Hkv, D) → (T, Hq, D); zeros on rows of no sequence. Differentiable by autograd."""
    groups = _groups(layout)
    rule = _Rule(causal, window, softcap, scale)
    if len(groups) == 1 and groups[0].rows == slice(0, q.shape[0]):
        return _attend(*(_take(x, groups[0]) for x in (q, k, v)), groups[0], rule).flatten(0, 1)
    outputs = [_real(_attend(*(_take(x, group) for x in (q, k, v)), group, rule), group) for group in groups]
    if not outputs:
        return torch.zeros_like(q) + (q.sum() + k.sum() + v.sum()) * 0
    rows = _output_rows(layout)
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
    parts = [_attend_step(q[step], k[step], v[step], _mask_of(group, step), rule) for step in steps]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _attend_step(q: Tensor, k: Tensor, v: Tensor, pad_keys: Tensor | None, rule: _Rule) -> Tensor:
    """q (n, Hkv, g, L, D), k and v (n, Hkv, L, D) → (n, L, Hkv·g, D), a block of queries at a time."""
    length = q.shape[3]
    if length <= QUERY_BLOCK:
        return _attend_block(q, k, v, pad_keys, rule, 0)
    blocks = [
        _attend_block(q[:, :, :, first : first + QUERY_BLOCK], k, v, pad_keys, rule, first)
        for first in range(0, length, QUERY_BLOCK)
    ]
    return torch.cat(blocks, dim=1)


def _attend_block(q: Tensor, k: Tensor, v: Tensor, pad_keys: Tensor | None, rule: _Rule, first: int) -> Tensor:
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
    if pad_keys is not None:
        scores = scores.masked_fill(pad_keys[..., low:high], float("-inf"))
    weights = torch.softmax(scores, dim=-1).view(count * kv_heads, shared * queries, high - low)
    out = torch.bmm(weights, v).view(count, kv_heads, shared, queries, width)
    return out.permute(0, 3, 1, 2, 4).reshape(count, queries, kv_heads * shared, width)


def _take(x: Tensor, group: _Group) -> Tensor:
    rows = x[group.rows] if isinstance(group.rows, slice) else x.index_select(0, group.rows)
    return rows.unflatten(0, (group.count, group.length))


def _real(out: Tensor, group: _Group) -> Tensor:
    flat = out.flatten(0, 1)
    return flat if group.tokens is None else flat.index_select(0, group.tokens)


def _mask_of(group: _Group, step: slice) -> Tensor | None:
    return None if group.pad_keys is None else group.pad_keys[step]


@lru_cache(maxsize=8)
def _groups(layout: SequenceLayout) -> tuple[_Group, ...]:
    """Made once a layout: every layer of a forward pass asks with the same one."""
    return tuple(_make_group(layout, members) for members in _members(layout))


@lru_cache(maxsize=8)
def _output_rows(layout: SequenceLayout) -> Tensor | None:
    """Where the groups' outputs, joined, belong; None where they already are in order.

    For a packed batch the inverse permutation (a gather is faster than a scatter), else the target rows.
    """
    starts, lengths = layout.starts.tolist(), layout.lengths.tolist()
    targets = torch.cat(
        [torch.arange(starts[i], starts[i] + lengths[i]) for members in _members(layout) for i in members]
    )
    if targets.numel() < layout.total:
        return targets.to(layout.device)
    if torch.equal(targets, torch.arange(layout.total)):
        return None
    return targets.argsort().to(layout.device)


@lru_cache(maxsize=8)
def _members(layout: SequenceLayout) -> tuple[tuple[int, ...], ...]:
    """Sequence numbers by group: longest first, near-equal lengths together, empty sequences left out."""
    lengths = layout.lengths.tolist()
    order = sorted((i for i, n in enumerate(lengths) if n), key=lambda i: (-lengths[i], i))
    groups: list[list[int]] = []
    tokens = 0
    for i in order:
        if groups and _joins(lengths[groups[-1][0]], len(groups[-1]) + 1, tokens + lengths[i], lengths[i]):
            groups[-1].append(i)
            tokens += lengths[i]
        else:
            groups.append([i])
            tokens = lengths[i]
    return tuple(tuple(sorted(group)) for group in groups)


def _joins(longest: int, count: int, tokens: int, length: int) -> bool:
    if length == longest:
        return True
    return longest <= PADDED_LENGTH and count * longest - tokens <= PADDING_SHARE * count * longest


def _make_group(layout: SequenceLayout, members: tuple[int, ...]) -> _Group:
    starts = torch.tensor([layout.starts.tolist()[i] for i in members])
    lengths = torch.tensor([layout.lengths.tolist()[i] for i in members])
    count, longest = len(members), int(lengths.max())
    if int(lengths.min()) == longest:
        first = int(starts[0])
        if torch.equal(starts, first + torch.arange(count) * longest):
            return _Group(count, longest, slice(first, first + count * longest), None, None)
        rows = (starts[:, None] + torch.arange(longest)).flatten()
        return _Group(count, longest, rows.to(layout.device), None, None)
    positions = torch.arange(longest)
    real = positions < lengths[:, None]
    rows = starts[:, None] + positions.minimum(lengths[:, None] - 1)  # padding repeats the last token
    return _Group(
        count,
        longest,
        rows.flatten().to(layout.device),
        real.flatten().nonzero().flatten().to(layout.device),
        ~real[:, None, None, :].to(layout.device),
    )
