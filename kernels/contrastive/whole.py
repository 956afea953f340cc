"""The plain rule with the whole matrix of similarities at once: the fastest way where that matrix is small.

Three products, where tiles take four, and a gradient written out, where PyTorch's own would take twice the operations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..products import multiplies_bfloat16, product
from .rule import Rule, inverse_lengths, row_blocks, rows_a_block, softplus


def whole_loss(queries: Tensor, documents: Tensor, scale: Tensor, rule: Rule, reduction: str) -> Tensor:
    """(N, d), (M, d) → (N,) losses or their mean or sum; the positive of row i is document i, all others negatives."""
    return _Whole.apply(queries, documents, scale, rule, reduction)


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queries: Tensor, documents: Tensor, scale: Tensor, rule: Rule, reduction: str) -> Tensor:
        (x, x_inverse), (y, y_inverse) = _operand(queries, rule.cosine), _operand(documents, rule.cosine)
        z = product(x, y.T).to(scale.dtype).mul_(scale)  # from here on in place: one matrix is kept
        own = z.diagonal().clone()
        if not rule.bounded:
            peak = z.amax(1)
            own.sub_(peak)
            z.sub_(peak[:, None])
        powers = z.exp_()
        powers.diagonal().zero_()
        rest = powers.sum(1)
        ctx.save_for_backward(x, x_inverse, y, y_inverse, scale, powers, own, rest)
        ctx.dtype, ctx.share = queries.dtype, 1 / rest.shape[0] if reduction == "mean" else 1.0
        losses = softplus(rest.log() - own)
        return losses if reduction == "none" else losses.mean() if reduction == "mean" else losses.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, x_inverse, y, y_inverse, scale, powers, own, rest = ctx.saved_tensors
        for_queries, for_documents, for_scale, *_ = ctx.needs_input_grad
        weight = grad * ctx.share / (rest + own.exp())
        h = (powers * weight[:, None]).to(x.dtype)
        h.diagonal().copy_(weight * -rest)
        into_x = product(h, y) if for_queries or for_scale else None
        slope = _aligned(into_x, x) if for_scale else None
        dqueries = _finished(into_x, x, x_inverse, scale, ctx.dtype) if for_queries else None
        ddocuments = _finished(product(h.T, x), y, y_inverse, scale, ctx.dtype) if for_documents else None
        return dqueries, ddocuments, slope, None, None


def _operand(x: Tensor, cosine: bool) -> tuple[Tensor, Tensor | None]:
    """Rows as the products take them, and (n, 1) what they were multiplied by; of zeros they stay zeros."""
    wide = torch.promote_types(x.dtype, torch.float32)
    dtype = x.dtype if x.dtype == torch.bfloat16 and multiplies_bfloat16() else wide
    if not cosine:
        return x.to(dtype), None
    if x.shape[0] <= rows_a_block(x.shape[1]):
        b_x = x.to(wide)
        inverse = inverse_lengths(b_x)
        return (b_x * inverse).to(dtype), inverse
    unit, inverse = x.new_empty(x.shape, dtype=dtype), x.new_empty((x.shape[0], 1), dtype=wide)
    for block in row_blocks(x):
        unit[block], inverse[block] = _operand(x[block], True)
    return unit, inverse


def _aligned(into: Tensor, unit: Tensor) -> Tensor:
    """() the gradient of a factor on every row, in float32."""
    wide = torch.promote_types(into.dtype, torch.float32)
    return sum((into[block].to(wide) * unit[block]).sum() for block in row_blocks(into))


def _finished(into: Tensor, unit: Tensor, inverse: Tensor | None, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of rows as the user gave them, from that of unit rows, which is used up."""
    if into.shape[0] > rows_a_block(into.shape[1]):
        in_place = into.dtype == dtype == scale.dtype
        out = into if in_place else into.new_empty(into.shape, dtype=dtype)
        for block in row_blocks(into):
            made = _finished(into[block], unit[block], None if inverse is None else inverse[block], scale, dtype)
            if not in_place:
                out[block] = made
        return out
    gradient = into.to(scale.dtype).mul_(scale if inverse is None else scale * inverse)
    if inverse is not None:
        unit = unit.to(scale.dtype)
        gradient.addcmul_(unit, (unit * gradient).sum(1, keepdim=True), value=-1)
    return gradient.to(dtype)
