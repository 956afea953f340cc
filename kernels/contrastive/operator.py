"""The loss as PyTorch operators: whole to torch.compile, differentiable, with shapes known beforehand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .passes import Gradients, Saved, backward, forward, problem_of
from .rule import Rule


@torch.library.custom_op("llm2vec_fast::contrastive_loss", mutates_args=())
def contrastive_operator(
    queries: Tensor,
    documents: Tensor,
    scale: Tensor,
    positives: Tensor | None,
    ids: Tensor | None,
    known: Tensor | None,
    guide_queries: Tensor | None,
    guide_documents: Tensor | None,
    cosine: bool,
    symmetric: bool,
    query_negatives: bool,
    document_negatives: bool,
    margin: float | None,
    bounded: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses (N,), and what the backward pass needs: see `Saved`. Only the losses are differentiable."""
    guide = None if guide_queries is None else (guide_queries, guide_documents)
    rule = Rule(cosine, symmetric, query_negatives, document_negatives, margin, bounded)
    with torch.autocast(queries.device.type, enabled=False):
        losses, saved = forward(problem_of(queries, documents, scale, positives, ids, known, guide, rule, backend))
    return losses, *saved


@contrastive_operator.register_fake
def _(queries, documents, scale, positives, ids, known, guide_queries, guide_documents, cosine, symmetric,
      query_negatives, document_negatives, margin, bounded, backend):  # fmt: skip
    dtype = torch.promote_types(queries.dtype, torch.float32)
    losses, own = (queries.new_empty(queries.shape[0], dtype=dtype) for _ in range(2))
    sums = queries.new_empty((2, queries.shape[0]), dtype=dtype)
    return losses, own, sums, queries.new_empty((2, documents.shape[0] if symmetric else 0), dtype=dtype)


@torch.library.custom_op("llm2vec_fast::contrastive_loss_backward", mutates_args=())
def contrastive_backward_operator(
    grad: Tensor,
    own: Tensor,
    sums: Tensor,
    column_sums: Tensor,
    queries: Tensor,
    documents: Tensor,
    scale: Tensor,
    positives: Tensor | None,
    ids: Tensor | None,
    known: Tensor | None,
    guide_queries: Tensor | None,
    guide_documents: Tensor | None,
    cosine: bool,
    symmetric: bool,
    query_negatives: bool,
    document_negatives: bool,
    margin: float | None,
    bounded: bool,
    backend: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, documents and scale; empty where ``needs`` says they are not wanted."""
    guide = None if guide_queries is None else (guide_queries, guide_documents)
    rule = Rule(cosine, symmetric, query_negatives, document_negatives, margin, bounded)
    like = Gradients(*(x if need else None for x, need in zip((queries, documents, scale), needs, strict=True)))
    with torch.autocast(queries.device.type, enabled=False):
        problem = problem_of(queries, documents, scale, positives, ids, known, guide, rule, backend)
        made = backward(problem, Saved(own, sums, column_sums), grad, like)
    return tuple(
        x.new_empty(0) if out is None else out for x, out in zip((queries, documents, scale), made, strict=True)
    )


@contrastive_backward_operator.register_fake
def _(grad, own, sums, column_sums, queries, documents, scale, positives, ids, known, guide_queries, guide_documents,
      cosine, symmetric, query_negatives, document_negatives, margin, bounded, backend, needs):  # fmt: skip
    sources = zip((queries, documents, scale), needs, strict=True)
    return tuple(x.new_empty(x.shape if need else 0) for x, need in sources)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.settings = *inputs[:8], inputs[8:]
    _, *saved = output
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*saved, *tensors)


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:3])
    if grad is None or not any(needs):
        return (None,) * (8 + len(ctx.settings))
    gradients = contrastive_backward_operator(grad, *ctx.saved_tensors, *ctx.settings, needs)
    wanted = (x if need else None for x, need in zip(gradients, needs, strict=True))
    return *wanted, *(None,) * (5 + len(ctx.settings))


contrastive_operator.register_autograd(_backward, setup_context=_setup_context)
