"""What the contrastive tests share: cases, their inputs, and gradients by every way of computing them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llm2vec_fast.kernels.contrastive import contrastive_loss

NAMES = ("losses", "dqueries", "ddocuments", "dscale")


@dataclass(frozen=True)
class Case:
    """One call of contrastive_loss; prints as a readable test id."""

    rows: int
    documents: int
    width: int
    settings: dict[str, Any] = field(default_factory=dict)
    shared: bool = False  # positives= in no order, some documents with several queries
    same: bool = False  # ids=, with documents of one id
    guide: int = 0  # guide=, of so many columns
    known: int = 0  # known=, at most so many further ids a query
    scale: float = 20.0

    def __str__(self) -> str:
        settings = "".join(f"-{name}={value}" for name, value in self.settings.items())
        flags = ("-shared" if self.shared else "") + ("-same" if self.same else "")
        flags += f"-guide{self.guide}" if self.guide else ""
        flags += f"-known{self.known}" if self.known else ""
        scale = "" if self.scale == 20.0 else f"-scale={self.scale:g}"
        return f"N{self.rows}-M{self.documents}-D{self.width}{settings}{flags}{scale}"

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Queries and documents, as columns of wider tensors; a query resembles its document."""
        generator = torch.Generator().manual_seed(self.rows * 1000 + self.documents * 10 + self.width)
        documents = torch.randn(self.documents, self.width + 3, generator=generator)
        own = documents[self.targets()["positives"] if self.shared else slice(self.rows)]
        queries = own + 2 * torch.randn(self.rows, self.width + 3, generator=generator)
        if self.settings.get("similarity") == "dot":
            queries, documents = queries / self.width**0.5, documents / self.width**0.5
        return queries.to(dtype)[:, : self.width], documents.to(dtype)[:, : self.width]

    def targets(self) -> dict[str, Any]:
        """positives, ids, known and guide, as the case has them; columns of wider tensors."""
        generator = torch.Generator().manual_seed(self.rows + self.documents)
        found = {}
        if self.shared:
            found["positives"] = torch.randint(self.documents, (self.rows, 2), generator=generator)[:, 0]
        if self.same:
            most = max(1, self.documents // 2)
            found["ids"] = torch.randint(most, (self.documents, 2), generator=generator)[:, 0] * 2**33
        if self.known:
            found.setdefault("ids", torch.arange(self.documents) * 2**33)
            some = torch.randint(self.documents, (self.rows, self.known), generator=generator)
            filled = torch.rand(some.shape, generator=generator) < 0.3
            found["known"] = found["ids"][some].masked_fill(filled, -1)
        if self.guide:
            found["guide"] = tuple(
                torch.randn(count, self.guide, generator=generator) for count in (self.rows, self.documents)
            )
        return found


def losses_and_gradients(
    case: Case, queries: Tensor, documents: Tensor, backend: str, **more: Any
) -> tuple[Tensor, ...]:
    """Losses a row, then gradients of queries, documents and scale for an upstream gradient of 1 … 2 a row."""
    scale_dtype = torch.promote_types(queries.dtype, torch.float32)
    tensors = [x.detach().requires_grad_() for x in (queries, documents, torch.tensor(case.scale, dtype=scale_dtype))]
    settings = {**case.settings, **case.targets(), "reduction": "none", "backend": backend, **more}
    losses = contrastive_loss(tensors[0], tensors[1], scale=tensors[2], **settings)
    upstream = 1 + torch.arange(losses.shape[0], dtype=losses.dtype) / losses.shape[0]
    dqueries, ddocuments, dscale = torch.autograd.grad(losses, tensors, upstream)
    # The gradient of the scale is a sum that cancels: its rounding is that of the terms, which stand beside it, and
    # these are as exact as the rows.
    sized = torch.stack([dscale, upstream.sum() * _largest(case, queries, documents)])
    return losses, dqueries, ddocuments, sized.to(queries.dtype)


def _largest(case: Case, queries: Tensor, documents: Tensor) -> Tensor:
    """The largest similarity there may be."""
    if case.settings.get("similarity") != "dot":
        return torch.ones(())
    return (queries.double() @ documents.double().T).abs().max().to(torch.promote_types(queries.dtype, torch.float32))


def three_ways(case: Case, dtype: torch.dtype, backend: str, tensors: tuple[Tensor, ...] | None = None):
    """For each of NAMES: by ``backend``, by plain PyTorch in the same dtype, and in float64."""
    queries, documents = case.inputs(dtype) if tensors is None else tensors
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN: an unwritten element shows
    try:
        ours = losses_and_gradients(case, queries, documents, backend)
    finally:
        torch.use_deterministic_algorithms(before)
    plain = losses_and_gradients(case, queries, documents, "reference")
    exact = losses_and_gradients(case, queries.double(), documents.double(), "reference")
    return zip(NAMES, ours, plain, exact, strict=True)
