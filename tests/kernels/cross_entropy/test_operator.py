"""The loss is a proper PyTorch operator: checked, compiled whole and once however many rows have labels."""

import pytest
import torch
from cross_entropy_cases import Case
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from llm2vec_fast.kernels.cross_entropy import linear_cross_entropy
from llm2vec_fast.kernels.cross_entropy.operator import (
    linear_cross_entropy_backward_operator,
    linear_cross_entropy_operator,
)


@pytest.mark.parametrize(("reduction", "return_lse"), [("mean", False), ("mean", True), ("none", False)])
@pytest.mark.parametrize("backend", ["blocked", "triton"])
def test_opcheck(backend, reduction, return_lse):
    case = Case(20, 50, 16, bias=True)
    hidden, weight, bias = (x.requires_grad_() for x in case.tensors(torch.float32))
    rule = (-100, 3.0, 0.1, 0.01, reduction)
    arguments = (hidden, weight, bias, case.labels(), *rule, [True] * 3, True, return_lse, True, backend)
    torch.library.opcheck(linear_cross_entropy_operator, arguments)
    detached = [x.detach() for x in (hidden, weight, bias)]
    loss, lse, *_ = linear_cross_entropy_operator(*detached, *arguments[3:])
    upstream = torch.ones_like(lse) if return_lse else None
    unformed = [x.new_empty(0) for x in detached]
    torch.library.opcheck(
        linear_cross_entropy_backward_operator,
        (torch.ones_like(loss), upstream, *detached, case.labels(), lse, *unformed, *rule, [True] * 3, backend),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("backend", ["blocked", "triton"])
def test_it_compiles_whole_and_only_once_as_token_counts_change(backend, trained):
    torch._dynamo.reset()
    counters.clear()

    @torch.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    def step(hidden, weight, labels):
        out = linear_cross_entropy(hidden * 2, weight, labels, return_accuracy=True, backend=backend)
        return out.loss * 3, out.accuracy

    # PyTorch itself specialises on one row, and on sizes that happen to be equal.
    for rows, share in ((40, 0.3), (41, 0.0), (7, 1.0), (90, 0.5)):
        case = Case(rows, 50, 16, labelled=share)
        hidden, weight, _ = case.tensors(torch.float32)
        wanted = [hidden.requires_grad_(), weight.requires_grad_()] if trained else [hidden.requires_grad_()]
        loss, accuracy = step(hidden, weight, case.labels())
        grads = torch.autograd.grad(loss, wanted)
        expected = linear_cross_entropy(hidden * 2, weight, case.labels(), return_accuracy=True, backend="reference")
        torch.testing.assert_close(loss, expected.loss * 3)
        torch.testing.assert_close(accuracy, expected.accuracy)
        torch.testing.assert_close(grads, torch.autograd.grad(expected.loss * 3, wanted))
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("backend", ["blocked", "triton"])
def test_checkpointing_changes_nothing(backend):
    case = Case(40, 100, 16)
    hidden, weight, _ = (x if x is None else x.requires_grad_() for x in case.tensors(torch.float32))

    def loss(hidden, weight):
        return linear_cross_entropy(hidden * 2, weight, case.labels(), backend=backend)

    plain = torch.autograd.grad(loss(hidden, weight), (hidden, weight))
    again = torch.autograd.grad(checkpoint(loss, hidden, weight, use_reentrant=False), (hidden, weight))
    assert all(torch.equal(x, y) for x, y in zip(plain, again, strict=True))


def test_backward_inside_autocast_keeps_float32():
    case = Case(40, 100, 16)
    hidden, weight, _ = (x if x is None else x.requires_grad_() for x in case.tensors(torch.float32))
    loss = linear_cross_entropy(hidden, weight, case.labels(), reduction="none").sum()
    expected = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = torch.autograd.grad(loss, (hidden, weight))
    for x, y in zip(inside, expected, strict=True):
        torch.testing.assert_close(x, y)
