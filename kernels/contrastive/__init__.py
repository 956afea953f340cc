"""In-batch contrastive loss (InfoNCE) whose matrix of similarities is never written."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..dispatch import Choice, choose
from .operator import contrastive_operator
from .reference import contrastive_reference
from .rule import BOUNDED_SCALE, NO_ID, Rule
from .whole import whole_loss

__all__ = ["NO_ID", "contrastive_loss"]

_ALL = ("reference", "blocked", "triton")
_REDUCTIONS = ("mean", "sum", "none")
_SIMILARITIES = ("cos", "dot")
# On a CPU "auto" computes the whole matrix at once where it has at most this many bytes of float32, as measured: under
# the plain rule with three products and a gradient that is written out, under any other by the definition.
WHOLE_BYTES = {"plain": 32 * 2**20, "other": 160 * 2**10}


def contrastive_loss(
    queries: Tensor,
    documents: Tensor,
    *,
    positives: Tensor | None = None,
    scale: float | Tensor = 20.0,
    similarity: str = "cos",
    symmetric: bool = False,
    query_negatives: bool = False,
    document_negatives: bool = False,
    ids: Tensor | None = None,
    known: Tensor | None = None,
    guide: tuple[Tensor, Tensor] | None = None,
    false_negative_margin: float | None = None,
    group: Any = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """−log of the softmax, over all documents of the batch, of each query's own document.

    Memory grows with the rows, not with their product: similarities are computed in tiles, forward with a running
    log-sum-exp, and again backward.

    Args:
        queries: (N, d), N ≥ 1; float16, bfloat16 or float32 (float64 but on Triton). Softmax and sums are float32.
        documents: (M, d) of the same dtype. The first N are the queries' own unless ``positives`` says otherwise, the
            others are hard negatives: M ≥ N. Any number a query, in any order.
        positives: (N,) integers, the document of each query; queries may share one.
        scale: factor on the similarities, the inverse of the temperature: a positive number, or a tensor of one
            element, which gets a gradient.
        similarity: "cos" (of vectors of zeros: 0), or "dot".
        symmetric: the mean of this loss and of the one that finds each document's query among all queries.
        query_negatives: the other queries are negatives too (Li et al., 2023); not in the symmetric direction.
        document_negatives: so are, in the same sum, the other queries and the queries' own documents as compared with
            this query's own document. The similarity of the two counts twice in that sum, once from each side. With
            ``query_negatives`` that is all of GTE's loss. Not with ``symmetric``.
        ids: (M,) integers: a document of the id of a query's own is none of its negatives. Each document has an id of
            its own if None.
        known: (N, K) integers, filled up with −1: the ids of further documents known to suit each query, which are none
            of its negatives either. Queries that have an id in common, of those known or of their own documents, are
            not each other's negatives, which takes (1 + K)² comparisons a pair of queries: name those in the batch
            only. Needs ``ids``.
        guide: (N, g) and (M, g) rows of another model for the queries and the documents, of any floating-point dtype:
            the margin, 0 if there is none, compares their cosines instead, as GISTEmbed does with the negated margin
            (Solatorio, 2024). Not on Triton: on a GPU "auto" then computes the tiles by PyTorch, which is slower
            and holds these rows in float32.
        false_negative_margin: negatives whose similarity (before the scale) exceeds that of the positive by more than
            this, and than rounding may, are left out as unlabelled positives (Zhang et al., 2025). In the symmetric
            direction the positive of a document of several queries is the one most similar to it.
        group: a torch.distributed process group over whose ranks the batch is spread, N, M and rows differing as they
            may: every rank calls, and runs backward. Documents travel round the ranks, a rank's worth at a time, or all
            at once where 256 MiB hold all ranks' and the sums of their gradients. ``positives`` number this rank's own
            documents; ``ids`` and ``known`` are compared across ranks.
        reduction: "mean" or "sum" over the queries (of all ranks: each returns the same), or "none": (N,), this rank's.
        backend: "auto", "reference", "blocked" or "triton". On a CPU "auto" computes the whole matrix at once where
            that is faster: up to 32 MiB of float32, or 160 KiB where anything from positives to
            false_negative_margin but scale and similarity is given.

    Returns:
        The loss, float32 (float64 for float64). Across ranks, a rank's gradients are those of the returned loss with
        respect to its own rows; that of ``scale`` is a part, to be summed over ranks. DistributedDataParallel takes
        the mean over ranks where the sum is needed: multiply the loss by the number of ranks before ``backward``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or a setting is out of range. The values of
            ``positives`` and of a tensor ``scale`` are checked on a CPU only, where nobody has to wait for them.
        BackendUnavailableError: an explicit backend cannot run this call: "reference" knows no ``group``.

    Autocast changes nothing: rows are used in the dtype they have. Where a CPU multiplies bfloat16, products of such
    rows round similarities to it, unless there is a margin to compare them with; elsewhere they are float32.

    Source: van den Oord et al., 2018 (arXiv:1807.03748); tiles after Inf-CL (Cheng et al., 2024, arXiv:2410.17243);
    query and document negatives after GTE (arXiv:2308.03281), margin after Qwen3 Embedding (arXiv:2506.05176), guide
    after GISTEmbed (arXiv:2402.16829).
    """
    _check_rows(queries, documents)
    _check_targets(queries, documents, positives, ids, known)
    _check_settings(similarity, reduction, false_negative_margin, symmetric and document_negatives)
    cosine = similarity == "cos"
    bounded = cosine and not isinstance(scale, Tensor) and scale <= BOUNDED_SCALE
    if guide is not None:
        _check_guide(queries, documents, guide)
        guide = tuple(x.detach() for x in guide)
        false_negative_margin = false_negative_margin or 0.0
    rule = Rule(cosine, symmetric, query_negatives, document_negatives, false_negative_margin, bounded)
    scale = _scale_tensor(scale, queries)
    positives = None if positives is None else positives.long().contiguous()
    missing = (
        "triton" if queries.dtype == torch.float64 or guide is not None else "",
        "reference" if group is not None else "",
    )
    implemented = tuple(name for name in _ALL if name not in missing)
    plain = positives is None and ids is None and rule.plain
    whole = _whole(queries, documents, plain, rule) if group is None else None
    choice = choose("contrastive_loss", backend, queries.device.type, implemented, preferred=whole)
    if group is not None:
        from .group import group_loss

        return group_loss(
            queries, documents, scale, positives, ids, known, guide, rule, choice.backend, group, reduction
        )
    if choice is whole and plain:
        return whole_loss(queries, documents, scale, rule, reduction)
    if choice.backend == "reference":
        if choice is whole:
            queries, documents = queries.to(scale.dtype), documents.to(scale.dtype)
        with torch.autocast(queries.device.type, enabled=False):
            losses = contrastive_reference(queries, documents, scale, positives, ids, known, guide, rule)
    else:
        losses, *_ = contrastive_operator(
            queries, documents, scale, positives, ids, known, *(guide or (None, None)), cosine, symmetric,
            query_negatives, document_negatives, false_negative_margin, bounded, choice.backend,
        )  # fmt: skip
    return losses if reduction == "none" else losses.sum() if reduction == "sum" else losses.mean()


def _whole(queries: Tensor, documents: Tensor, plain: bool, rule: Rule) -> Choice | None:
    """The choice of "auto" where the matrix is small enough to be computed at once; None elsewhere.

    A compiler would have to compile anew where the batch crosses that size: it only ever sees tiles.
    """
    if torch.compiler.is_compiling():
        return None
    columns = documents.shape[0] + (rule.query_negatives + 2 * rule.document_negatives) * queries.shape[0]
    most = WHOLE_BYTES["plain" if plain else "other"]
    if queries.device.type != "cpu" or 4 * queries.shape[0] * columns > most:
        return None
    return Choice("reference", f"at most {most} bytes of similarities, which a CPU computes faster at once")


def _scale_tensor(scale: float | Tensor, queries: Tensor) -> Tensor:
    """() on the rows' device, in the dtype of sums."""
    dtype = torch.promote_types(queries.dtype, torch.float32)
    if not isinstance(scale, Tensor):
        if not 0 < scale < math.inf:
            raise ValueError(f"scale={scale} is not a positive number: pass the inverse of the temperature, such as 20")
        return torch.full((), scale, dtype=dtype, device=queries.device)
    if scale.numel() != 1 or not scale.is_floating_point() or scale.device != queries.device:
        raise ValueError(
            f"scale is a {scale.dtype} tensor of shape {tuple(scale.shape)} on {scale.device}: "
            f"pass one floating-point element on {queries.device}"
        )
    if scale.device.type == "cpu" and not torch.compiler.is_compiling() and not 0 < float(scale.detach()) < math.inf:
        raise ValueError(f"scale={float(scale.detach())} is not a positive number: pass the inverse of the temperature")
    return scale.reshape(()).to(dtype)


def _check_rows(queries: Tensor, documents: Tensor) -> None:
    if queries.ndim != 2 or documents.ndim != 2 or queries.shape[1] != documents.shape[1]:
        raise ValueError(
            f"queries and documents have shapes {tuple(queries.shape)} and {tuple(documents.shape)}: "
            "pass (N, d) and (M, d)"
        )
    if not queries.is_floating_point() or queries.dtype != documents.dtype:
        raise ValueError(f"queries are {queries.dtype} and documents {documents.dtype}: pass one floating-point dtype")
    if queries.device != documents.device:
        raise ValueError(f"queries are on {queries.device} and documents on {documents.device}: move them to one")
    if queries.shape[0] == 0 or queries.shape[1] == 0:
        raise ValueError(f"queries have shape {tuple(queries.shape)}: pass at least one row and one column")


def _check_targets(
    queries: Tensor, documents: Tensor, positives: Tensor | None, ids: Tensor | None, known: Tensor | None
) -> None:
    rows, count = queries.shape[0], documents.shape[0]
    if positives is None and count < rows:
        raise ValueError(f"there are {rows} queries and {count} documents: pass a document for each, or positives=")
    given = (("positives", positives, rows, ""), ("ids", ids, count, ""), ("known", known, rows, " K"))
    for name, x, length, more in given:
        if x is None:
            continue
        fits = x.ndim == (2 if more else 1) and x.shape[0] == length
        if not fits or x.dtype not in (torch.int32, torch.int64) or x.device != queries.device:
            raise ValueError(
                f"{name} is {x.dtype} of shape {tuple(x.shape)} on {x.device}: "
                f"pass ({length},{more}) int32 or int64 on {queries.device}"
            )
    if known is not None and ids is None:
        raise ValueError("known is given and ids is not: pass the ids of the documents that it names")
    if positives is None or positives.device.type != "cpu" or torch.compiler.is_compiling():
        return
    least, most = (int(x) for x in positives.aminmax())
    if least < 0 or most >= count:
        wrong = least if least < 0 else most
        raise ValueError(f"positives holds {wrong}: documents are numbered 0 … {count - 1}")


def _check_guide(queries: Tensor, documents: Tensor, guide: tuple[Tensor, Tensor]) -> None:
    if len(guide) != 2:
        raise ValueError(f"guide holds {len(guide)} tensors: pass one for the queries and one for the documents")
    for name, x, like in zip(("queries", "documents"), guide, (queries, documents), strict=True):
        fits = x.ndim == 2 and x.shape == (like.shape[0], guide[0].shape[-1])
        if not fits or not x.is_floating_point() or x.device != like.device:
            raise ValueError(
                f"guide holds {x.dtype} of shape {tuple(x.shape)} on {x.device} for the {name}: "
                f"pass floating-point ({like.shape[0]}, g) on {like.device}"
            )


def _check_settings(similarity: str, reduction: str, margin: float | None, both: bool) -> None:
    if both:
        raise ValueError("symmetric=True and document_negatives=True: give one, the second looks both ways itself")
    if similarity not in _SIMILARITIES:
        raise ValueError(f"similarity={similarity!r} is unknown: choose one of {', '.join(_SIMILARITIES)}")
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction={reduction!r} is unknown: choose one of {', '.join(_REDUCTIONS)}")
    if margin is not None and not math.isfinite(margin):
        raise ValueError(f"false_negative_margin={margin} is not a number: pass None to keep every negative")
