"""What each process of the vocabulary-parallel tests runs: importable by name, as spawned processes need."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from cross_entropy_cases import IGNORED, Case

from llm2vec_fast.kernels.cross_entropy import linear_cross_entropy

# Slices of different size; the labels of some rows are on the first process, of some on the second.
SPLITS = (130, 203)
CASE = Case(40, sum(SPLITS), 24, bias=True)
RULES: list[dict[str, Any]] = [
    {"reduction": "mean"},
    {"reduction": "none"},
    {"reduction": "sum", "softcap": 5.0, "label_smoothing": 0.1, "z_loss": 0.01},
    {"class_weights": torch.linspace(0, 1, sum(SPLITS), dtype=torch.float32)},
]


def run(rank: int) -> dict[str, Any]:
    """Loss and gradients of every rule and backend on this process's slice."""
    found: dict[str, Any] = {}
    labels = CASE.labels()
    for backend in ("blocked", "triton"):
        for number, rule in enumerate(RULES):
            found[f"{backend}-{number}"] = _step(rank, backend, rule, labels)
        found[f"{backend}-without-labels"] = _step(rank, backend, {}, labels.new_full(labels.shape, IGNORED))
    for number, rule in enumerate(RULES):
        found[f"bfloat16-{number}"] = _step(rank, "blocked", rule, labels, torch.bfloat16)
    found["refused class weights"] = _refused(rank, labels, class_weights=torch.ones(SPLITS[0]))
    labels[3] = sum(SPLITS)
    found["refused"] = _refused(rank, labels)
    return found


def _refused(rank: int, labels: torch.Tensor, **given: Any) -> str:
    hidden, weight, _ = _slice(rank, CASE.tensors(torch.float32))
    try:
        linear_cross_entropy(hidden, weight, labels, group=dist.group.WORLD, **given)
    except ValueError as error:
        return str(error)
    return ""


def _step(
    rank: int, backend: str, rule: dict[str, Any], labels: torch.Tensor, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    hidden, weight, bias = (x.requires_grad_() for x in _slice(rank, CASE.tensors(dtype)))
    out = linear_cross_entropy(
        hidden, weight, labels, bias=bias, group=dist.group.WORLD, return_accuracy=True, return_log_probs=True,
        return_lse=True, backend=backend, **rule,
    )  # fmt: skip
    grads = torch.autograd.grad(out.loss.sum() + 0.1 * out.lse.square().sum(), (hidden, weight, bias))
    named = dict(zip(("dhidden", "dweight", "dbias"), grads, strict=True))
    return {
        "loss": out.loss.detach(),
        "accuracy": out.accuracy,
        "log_probs": out.log_probs,
        "lse": out.lse.detach(),
        **named,
    }


def _slice(rank: int, tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    hidden, weight, bias = tensors
    entries = slice(sum(SPLITS[:rank]), sum(SPLITS[: rank + 1]))
    return hidden, weight[entries].clone(), bias[entries].clone()
