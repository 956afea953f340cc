"""The log-sum-exp with its gradient, class weights, and batches of three dimensions."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from cross_entropy_cases import IGNORED, Case, three_ways
from numerics import GRADIENT_FACTOR, OUTPUT_FACTOR, assert_error_within
from torch import Tensor

from llm2vec_fast.kernels.cross_entropy import linear_cross_entropy

EACH = pytest.mark.parametrize("backend", ["reference", "blocked", "triton"])
CASES = [
    Case(37, 130, 24, bias=True, settings={"softcap": 3.0, "z_loss": 0.01}),
    Case(20, 50, 16, labelled=0.0),
    Case(20, 50, 16, labelled=1.0, settings={"label_smoothing": 0.1, "reduction": "none"}),
]


def of_both(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, share: float = 0.7, **settings
) -> dict[str, Tensor]:
    """The log-sum-exp, and gradients of a sum of it and of ``share`` of the loss."""
    given = {"hidden": hidden, "weight": weight, "bias": bias}
    given = {name: x.detach().requires_grad_() for name, x in given.items() if x is not None}
    out = linear_cross_entropy(
        given["hidden"], given["weight"], labels, bias=given.get("bias"), return_lse=True, **settings
    )
    factors = torch.linspace(-2, 2, len(out.lse), dtype=torch.float32).to(out.lse.dtype)
    total = (out.lse * factors).sum() + (out.loss.sum() * share if share else 0)
    return {"lse": out.lse.detach()} | dict(zip(given, torch.autograd.grad(total, list(given.values())), strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(
    ("backend", "dtype"), [("blocked", torch.float32), ("blocked", torch.float16), ("triton", torch.float32)]
)
@pytest.mark.parametrize("share", [0.7, 0.0], ids=["with the loss", "alone"])
def test_the_log_sum_exp_has_its_gradient(case, backend, dtype, share):
    found = three_ways(case, dtype, backend, lambda *given, **settings: of_both(*given, share=share, **settings))
    for name, (ours, plain, exact) in found.items():
        assert_error_within(ours, plain, exact, OUTPUT_FACTOR if name == "lse" else GRADIENT_FACTOR, name)


@EACH
def test_a_loss_of_ones_own_made_of_it_equals_that_of_all_logits(backend):
    """z-loss by hand: the square of the log-sum-exp, beside the cross-entropy."""
    case = Case(30, 60, 16, bias=True)
    tensors, labels = [x.requires_grad_() for x in case.tensors(torch.float32)], case.labels()
    out = linear_cross_entropy(*tensors[:2], labels, bias=tensors[2], return_lse=True, backend=backend)
    kept = labels != IGNORED
    logits = F.linear(*tensors)[kept]
    expected = F.cross_entropy(logits, labels[kept]) + 0.1 * logits.logsumexp(1).square().sum()
    loss = out.loss + 0.1 * out.lse.square().sum()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, tensors), torch.autograd.grad(expected, tensors))
    assert not out.lse[~kept].any()


@EACH
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_class_weights_are_those_of_torch(backend, reduction):
    case = Case(30, 60, 16)
    classes = torch.rand(60, generator=torch.Generator().manual_seed(0)).where(torch.arange(60) % 3 > 0, 0)
    given = {"reduction": reduction, "ignore_index": IGNORED}

    def found(hidden: Tensor, weight: Tensor, own: bool) -> list[Tensor]:
        hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
        if own:
            loss = linear_cross_entropy(hidden, weight, case.labels(), class_weights=classes, backend=backend, **given)
        else:
            logits = F.linear(hidden, weight)
            loss = F.cross_entropy(logits, case.labels(), weight=classes.to(logits.dtype), **given)
        return [loss.detach(), *torch.autograd.grad(loss.square().sum(), (hidden, weight))]

    tensors = case.tensors(torch.float32)[:2]
    exact = found(*(x.double() for x in tensors), own=False)
    for ours, plain, right in zip(found(*tensors, own=True), found(*tensors, own=False), exact, strict=True):
        assert_error_within(ours, plain, right, GRADIENT_FACTOR)


@EACH
def test_class_weights_that_are_all_zero_or_of_no_label_give_zero(backend):
    hidden, weight, _ = Case(10, 20, 8).tensors(torch.float32)
    for labels in (torch.full((10,), 3), torch.full((10,), IGNORED)):
        loss = linear_cross_entropy(hidden, weight, labels, class_weights=torch.zeros(20), backend=backend)
        assert loss.item() == 0


@EACH
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_batches_of_three_dimensions_are_their_rows(backend, reduction):
    case = Case(24, 50, 16)
    hidden, weight, _ = (None if x is None else x.requires_grad_() for x in case.tensors(torch.float32))
    asked = {"return_accuracy": True, "return_log_probs": True, "return_lse": True, "reduction": reduction}
    flat = linear_cross_entropy(hidden, weight, case.labels(), backend=backend, **asked)
    for shape in ((4, 6), (1, 24), (24, 1)):
        out = linear_cross_entropy(hidden.view(*shape, 16), weight, case.labels().view(shape), backend=backend, **asked)
        assert out.log_probs.shape == out.correct.shape == out.lse.shape == shape
        assert out.loss.shape == (shape if reduction == "none" else ())
        for one, other in zip(flat, out, strict=True):
            torch.testing.assert_close(one.flatten(), other.flatten(), rtol=0, atol=0)
        grads = [
            torch.autograd.grad(x.loss.sum() + x.lse.sum(), (hidden, weight), retain_graph=True) for x in (flat, out)
        ]
        torch.testing.assert_close(*grads, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"class_weights": torch.ones(19)}, "(19,)"),
        ({"class_weights": torch.ones(20, dtype=torch.int64)}, "torch.int64"),
        ({"class_weights": torch.ones(20, requires_grad=True)}, "wants a gradient"),
        ({"class_weights": torch.ones(20), "label_smoothing": 0.1}, "label_smoothing=0.1"),
    ],
)
def test_class_weights_that_do_not_fit_are_refused(given, told):
    hidden, weight, _ = Case(10, 20, 8).tensors(torch.float32)
    with pytest.raises(ValueError, match=re.escape(told)):
        linear_cross_entropy(hidden, weight, torch.zeros(10, dtype=torch.int64), **given)
