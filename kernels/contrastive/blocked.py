"""Tiles of the matrix of similarities in plain PyTorch: a few mebibytes at a time, made, used and forgotten.

Rows of bfloat16 are multiplied as such where the processor can, and everything between two products is float32: as
exact as a product and cross-entropy in bfloat16, and several times as fast as float32. Elsewhere, and where a margin
compares similarities, which must not be off by a rounding, rows are widened block by block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..products import multiplies_bfloat16, product
from .rule import LogSum, Side, blocks, inverse_lengths, row_blocks, same

# A tile stays in the level-2 caches of two cores while it passes through the softmax.
TILE_BYTES = 2 * 2**20
# Queries whose gradient is accumulated at once: the height of a tile. Documents are normalised once for each panel.
PANEL_ROWS = 1024


def prepared(x: Tensor, cosine: bool, compared: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The rows as they are, 1 / the length each has, and what makes it one: the same. For dot products, None.

    Whether similarities are ``compared`` with a margin changes nothing here, but how their products are made.
    """
    if not cosine:
        return x, None, None
    inverse = x.new_empty(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))
    for block in row_blocks(x):
        inverse[block] = inverse_lengths(x[block].to(inverse.dtype))[:, 0]
    return x, inverse, inverse


def negative_sums(x: Side, y: Side, scale: Tensor, columns: bool, bounded: bool) -> tuple[LogSum, LogSum | None]:
    """log Σ e^z over the negatives of each row of x (n,), and of each row of y (m,) if asked."""
    empty = x.rows.new_empty(0, dtype=x.accumulator)
    sums, column_sums = [], LogSum.empty(empty, y.count) if columns else None
    for rows in blocks(x.count, PANEL_ROWS):
        part = x.part(rows)
        b_x = _operand(part, y)
        row_sums = LogSum.empty(empty, part.count)
        for block in blocks(y.count, tile_columns(x.accumulator)):
            other = y.part(block)
            z = _logits(b_x, _operand(other, x), scale)
            compared = _compared(z, part, other, scale)
            _fill_same(part, other, z, float("-inf"))
            if column_sums is not None:
                kept = _below(z, compared, other.limit, scale, 0)
                so_far = LogSum(*(x[block] for x in column_sums)).plus(_log_sum(kept, 0, kept is not z, bounded))
                column_sums.peak[block], column_sums.rest[block] = so_far
            row_sums = row_sums.plus(_log_sum(_below(z, compared, part.limit, scale, 1), 1, True, bounded))
        sums.append(row_sums)
    return LogSum(*(torch.cat(parts) for parts in zip(*sums, strict=True))), column_sums


def add_gradients(
    x: Side,
    y: Side,
    scale: Tensor,
    positives: tuple[Tensor, Tensor] | None,
    into_x: Tensor | None,
    into_y: Tensor | None,
) -> None:
    """Add H·y to ``into_x`` (n, d) and Hᵀ·x to ``into_y`` (m, d), H being the gradient of the similarities.

    Rows of x have a softmax over y; where y has weights, so do its rows over x. ``positives`` holds for each row of x
    its positive (a row of y) and the gradient of that entry.
    """
    b_x = _operand(x, y)
    for block in blocks(y.count, tile_columns(x.accumulator)):
        part = y.part(block)
        b_y = _operand(part, x)
        z = _logits(b_x, b_y, scale)
        compared = _compared(z, x, part, scale)
        h = _weights(z, compared, x, scale, 1, part.weight is None)
        if part.weight is not None:
            h += _weights(z, compared, part, scale, 0, True)
        _fill_same(x, part, h, 0.0)
        if positives is not None:
            columns, gradient = positives
            here = ((columns >= block.start) & (columns < block.stop)).nonzero()[:, 0]
            h[here, columns[here] - block.start] = gradient[here]
        h = h.to(b_x.dtype)
        if into_x is not None:
            into_x += product(h, b_y)
        if into_y is not None:
            into_y[block] += product(h.T, b_x)


def tile_columns(dtype: torch.dtype) -> int:
    """The width of a tile."""
    return TILE_BYTES // (PANEL_ROWS * dtype.itemsize)


def _operand(side: Side, other: Side) -> Tensor:
    """(n, d) rows as a product with those of ``other`` takes them."""
    plain = side.rows.dtype == torch.bfloat16 and multiplies_bfloat16() and side.limit is None and other.limit is None
    if plain and side.inverse is None:
        return side.rows
    return side.unit(slice(None)).to(side.rows.dtype if plain else side.accumulator)


def _logits(b_x: Tensor, b_y: Tensor, scale: Tensor) -> Tensor:
    """scale · x·yᵀ, in scale's dtype. Scaled rows would round differently when they stand on the other side."""
    return product(b_x, b_y.T).to(scale.dtype).mul_(scale)


def _compared(z: Tensor, x: Side, y: Side, scale: Tensor) -> Tensor:
    """What limits, times the scale, are compared with: z itself, or that of the guide."""
    return z if x.guide is None else _logits(x.guide, y.guide, scale)


def _weights(z: Tensor, compared: Tensor, side: Side, scale: Tensor, dim: int, last: bool) -> Tensor:
    """weight · e^(z − lse), 0 above the limit, for the softmax along ``dim``; in z's memory if this is its last use."""
    above = None if side.limit is None else compared > (side.limit * scale).unsqueeze(dim)
    peak, rest, weight = (x.unsqueeze(dim) for x in (side.peak, side.rest, side.weight))
    h = (z.sub_(peak) if last else z - peak).sub_(rest).exp_().mul_(weight)
    return h if above is None else h.masked_fill_(above, 0)


def _below(z: Tensor, compared: Tensor, limit: Tensor | None, scale: Tensor, dim: int) -> Tensor:
    """z, −inf above the limits of its rows (dim=1) or columns (dim=0)."""
    return z if limit is None else z.masked_fill(compared > (limit * scale).unsqueeze(dim), float("-inf"))


def _log_sum(z: Tensor, dim: int, last: bool, bounded: bool) -> LogSum:
    """log Σ e^z along ``dim``, in z's memory if this is its last use."""
    if bounded:
        total = (z.exp_() if last else z.exp()).sum(dim)
        return LogSum(torch.zeros_like(total), total.log_())
    peak = z.amax(dim, keepdim=True).clamp_min_(torch.finfo(z.dtype).min / 2)  # −inf − −inf would be NaN
    shifted = z.sub_(peak) if last else z - peak
    return LogSum(peak.squeeze(dim), shifted.exp_().sum(dim).log_())


def _fill_same(x: Side, y: Side, tile: Tensor, value: float) -> None:
    """Write ``value`` wherever row and column have a mark in common."""
    if x.first is None or y.first is None:
        tile.masked_fill_(same(x.marks, y.marks), value)
    elif -x.count < x.first - y.first < y.count:
        tile.diagonal(x.first - y.first).fill_(value)
