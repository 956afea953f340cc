"""Cross-entropy of a linear layer that never writes its logits, over the rows that have a label."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..dispatch import backend_for
from .operator import labelled, linear_cross_entropy_operator, refuse_wrong_labels, spread
from .parallel import linear_cross_entropy_parallel
from .reference import statistics_reference
from .rule import Rule

__all__ = ["CrossEntropy", "linear_cross_entropy"]

_ALL = ("reference", "blocked", "triton")
REDUCTIONS = ("mean", "sum", "none")


class CrossEntropy(NamedTuple):
    """What `linear_cross_entropy` returns when more than the loss is asked for."""

    loss: Tensor
    accuracy: Tensor | None  # () float32: the share of labelled rows whose label has the highest logit
    log_probs: Tensor | None  # float32, of the labels' shape: log-probability of each, 0 where ignored; no gradient
    correct: Tensor | None = None  # bool, of that shape, beside the accuracy: the label has the highest logit
    lse: Tensor | None = None  # float32, of that shape: log-sum-exp of the logits, 0 where ignored; with its gradient


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    class_weights: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    return_accuracy: bool = False,
    return_log_probs: bool = False,
    return_lse: bool = False,
    check_labels: bool | None = None,
    backend: str = "auto",
) -> Tensor | CrossEntropy:
    """Cross-entropy of hidden · weightᵀ + bias with the labels, without ever holding all these logits.

    Rows whose label is ``ignore_index`` are dropped before any product.

    Args:
        hidden: (T, d) rows, or (B, T, d); float16, bfloat16 or float32 (float64 but on Triton).
        weight: (V, d) in the same dtype.
        labels: (T,), or (B, T), int64 or int32, from 0 to V − 1, or ``ignore_index``.
        bias: (V,) in the same dtype, or None.
        softcap: logits become softcap · tanh(logits / softcap), as in Gemma 2.
        label_smoothing: ε; the target is 1 − ε on the label and ε / V on every entry, as in F.cross_entropy.
        z_loss: adds z_loss · lse² to each row's loss, lse the log-sum-exp of its logits (PaLM used 1e-4).
        reduction: "mean" over the labelled rows, "sum", or "none" for losses of the labels' shape, 0 on ignored rows.
        class_weights: (V,) of the whole vocabulary: what the loss of a row with that label is multiplied by; "mean"
            divides by their sum over the rows, as F.cross_entropy does. Not together with label_smoothing. The gradient
            of ``weight`` is then made as where the reduction is "none".
        group: processes that hold the vocabulary together, each the ``weight`` and ``bias`` of its own consecutive
            entries, in the order of their ranks; slices may differ in size. Hidden states and labels are the same on
            all of them, labels counted over the whole vocabulary; so are the loss and the gradient of ``hidden``.
        return_accuracy, return_log_probs: also return these, in a `CrossEntropy`; with the accuracy, row by row, too.
        return_lse: also return the log-sum-exp of each row's logits, for a loss of your own: it has a gradient. Nothing
            is then formed in the forward pass, and the logits are computed once more in the backward pass.
        check_labels: look for labels out of range and refuse them. None: on the CPU always, on a GPU, where looking
            makes the host wait, never; such a row's loss is NaN there, and nothing out of bounds is read.
        backend: "auto", "reference", "blocked" or "triton".

    Returns:
        The loss in float32 (float64 for float64), () or of the labels' shape; or a `CrossEntropy`. With no labelled
        row, "sum" and "mean" are 0 with zero gradients, and the accuracy is 0: a batch that happens to have no label
        spoils nothing.

    Under autocast, hidden, weight and bias are cast first. Softmax and sums are in float32, as is the accumulator of
    each gradient. Every combination of requires_grad computes what it needs and no more, and results are the same to
    the last bit from run to run. Gradients of gradients are not available.

    Products, each over the labelled rows only: the loss takes 1. blocked forms the gradient of ``hidden`` already in
    the forward pass, from logits it then has: loss and gradient take 2, as many as with all logits kept. The gradient
    of ``weight`` is formed there too unless the reduction is "none" (3 in all); in 16 bits, where the labelled rows'
    logits exceed one block, those of rows beyond the first d are multiplied once more (4 at most). Triton, ``group``
    and float16, whose gradients wait for the loss's scale, compute the logits once more in the backward pass (3 with a
    frozen weight, else 4).

    Memory beyond inputs and gradients, whatever V: blocked holds 44 MiB of logits, the labelled rows (N, d) once more,
    in float32 where their gradient is made in the backward pass, and a few slices of 2 MiB. Triton's forward pass holds
    no logits beyond a tile, its backward pass 64 MiB of their slope and (N, d) in float32, up to 8 times where N is
    small. Gradients that the forward pass forms are there from then on; torch.compile copies them once.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, a setting is out of range, or a label is.
        BackendUnavailableError: an explicit backend cannot run this call.

    Source: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models" (2024, arXiv:2411.09009), without its
    locks and its gradient filter; z-loss: Chowdhery et al., "PaLM" (2022, arXiv:2204.02311).
    """
    _check_tensors(hidden, weight, bias, labels)
    shape, hidden, labels = labels.shape, hidden.flatten(0, -2), labels.flatten()
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight, bias = (None if x is None else x.to(dtype) for x in (hidden, weight, bias))
    _check_dtypes(hidden, weight, bias)
    _check_settings(softcap, label_smoothing, z_loss, reduction)
    _check_class_weights(class_weights, hidden, None if group is not None else weight.shape[0], label_smoothing)
    implemented = [x for x in _ALL if (x != "triton" or hidden.dtype != torch.float64) and (x != _ALL[0] or not group)]
    choice = backend_for("linear_cross_entropy", backend, hidden, implemented)
    settings = {
        "ignore_index": ignore_index, "softcap": softcap, "smoothing": float(label_smoothing), "z_loss": float(z_loss),
        "reduction": reduction if class_weights is None else "none",
        "check": hidden.device.type == "cpu" if check_labels is None else check_labels,
    }  # fmt: skip
    if choice == "reference":
        loss, lse, log_probs, correct = _reference(hidden, weight, bias, labels, **settings)
    elif group is not None:
        loss, lse, log_probs, correct = linear_cross_entropy_parallel(
            hidden, weight, bias, labels, group=group, accuracy=return_accuracy, backend=choice,
            classes=None if class_weights is None else class_weights.shape[0], **settings,
        )  # fmt: skip
    else:
        needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
        settings["softcap"] = softcap or 0.0
        loss, lse, log_probs, correct, *_ = linear_cross_entropy_operator(
            hidden, weight, bias, labels, needs=needs, accuracy=return_accuracy, return_lse=return_lse, backend=choice,
            **settings,
        )  # fmt: skip
    if class_weights is not None:
        loss = _weighted(loss, labels, class_weights, ignore_index, reduction)
    loss = loss.view(shape) if reduction == "none" else loss
    if not (return_accuracy or return_log_probs or return_lse):
        return loss
    accuracy = correct.sum() / (labels != ignore_index).sum().clamp(min=1) if return_accuracy else None
    return CrossEntropy(
        loss,
        accuracy,
        log_probs.view(shape) if return_log_probs else None,
        correct.view(shape) if return_accuracy else None,
        lse.view(shape) if return_lse else None,
    )


def _weighted(losses: Tensor, labels: Tensor, class_weights: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """Losses (T,) of rows, each as many times as the weight of its label says, reduced."""
    known = (labels != ignore_index) & (labels >= 0) & (labels < class_weights.shape[0])
    weights = class_weights.to(losses.dtype).index_select(0, labels.where(known, 0)).where(known, 0)
    losses = losses * weights.where(known | (labels == ignore_index), 1)  # NaN stays where a label is out of range
    if reduction == "none":
        return losses
    total = weights.sum()
    return losses.sum() / total.where(total != 0, 1) if reduction == "mean" else losses.sum()


def _reference(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, **settings: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """By the definition: loss, log-sum-exp (T,), log-probabilities (T,) and correct (T,)."""
    rule = Rule(settings["softcap"], settings["smoothing"], settings["z_loss"], weight.shape[0])
    problem = labelled(hidden, weight, bias, labels, settings["ignore_index"], rule)
    if settings["check"]:
        refuse_wrong_labels(problem.labels, problem.rows, rule.vocabulary, settings["ignore_index"])
    statistics = statistics_reference(problem.taken(slice(None)), weight, bias, problem.labels, rule)
    losses = rule.losses(statistics)
    if settings["reduction"] == "none":
        loss = losses.new_zeros(hidden.shape[0]).index_copy(0, problem.rows, losses)
    else:
        loss = losses.sum() / (max(1, losses.shape[0]) if settings["reduction"] == "mean" else 1)
    correct = statistics.label >= statistics.highest
    log_probs = (statistics.label - statistics.lse).detach()
    return loss, spread(statistics.lse, problem), spread(log_probs, problem), spread(correct, problem)


def _check_tensors(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> None:
    if hidden.ndim not in (2, 3) or weight.ndim != 2 or hidden.shape[-1] != weight.shape[1] or 0 in weight.shape:
        raise ValueError(
            f"hidden and weight have shapes {tuple(hidden.shape)} and {tuple(weight.shape)}: pass (rows, width) or "
            "(batch, rows, width), and (vocabulary, width), not empty"
        )
    if labels.shape != hidden.shape[:-1] or labels.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"labels are {labels.dtype} of shape {tuple(labels.shape)}: pass one int64 a row of hidden, "
            f"{tuple(hidden.shape[:-1])}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}: pass one a row of weight, ({weight.shape[0]},)")
    tensors = [x for x in (hidden, weight, bias, labels) if x is not None]
    if len({x.device for x in tensors}) > 1:
        where = ", ".join(str(x.device) for x in tensors)
        raise ValueError(f"hidden, weight, bias if any, and labels are on {where}: move them to one device")


def _check_dtypes(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    dtypes = [x.dtype for x in (hidden, weight, bias) if x is not None]
    if not hidden.is_floating_point() or len(set(dtypes)) > 1:
        named = ", ".join(map(str, dtypes))
        raise ValueError(f"hidden, weight and bias, if any, are {named}: pass one floating-point dtype")


def _check_settings(softcap: float | None, label_smoothing: float, z_loss: float, reduction: str) -> None:
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap={softcap} is not a positive number: pass None for no cap")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing={label_smoothing} is not between 0 and 1")
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"z_loss={z_loss} is not a number from 0 on: pass 0 for none")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r} is unknown: choose one of {', '.join(REDUCTIONS)}")


def _check_class_weights(
    class_weights: Tensor | None, hidden: Tensor, vocabulary: int | None, label_smoothing: float
) -> None:
    if class_weights is None:
        return
    if class_weights.ndim != 1 or vocabulary not in (None, class_weights.shape[0]):
        raise ValueError(
            f"class_weights has shape {tuple(class_weights.shape)}: pass one an entry of the vocabulary, "
            f"{'(V,)' if vocabulary is None else (vocabulary,)}"
        )
    if not class_weights.is_floating_point() or class_weights.device != hidden.device or class_weights.requires_grad:
        raise ValueError(
            f"class_weights is {class_weights.dtype} on {class_weights.device}"
            f"{' and wants a gradient' if class_weights.requires_grad else ''}: pass floating-point numbers on "
            f"{hidden.device}, without a gradient"
        )
    if label_smoothing:
        raise ValueError(f"class_weights do not go with label_smoothing={label_smoothing}: pass one of the two")
