"""Both paths are proper PyTorch operators: checked, compiled whole and once, checkpointed, cast by autocast."""

import pytest
import torch
from attention_cases import Case
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from llm2vec_fast.kernels.attention import attention
from llm2vec_fast.kernels.attention.blocked_operator import blocked_backward_operator, blocked_operator
from llm2vec_fast.kernels.attention.operator import attention_backward_operator, attention_operator

RULES = {
    "plain": (None, False, -1, 0.0, 0.25, 0),
    "all": (torch.tensor([5]), True, 3, 2.0, 0.25, 20000),
}
BACKENDS = ("triton", "blocked")
OPERATORS = {
    "triton": (attention_operator, attention_backward_operator, ()),
    "blocked": (blocked_operator, blocked_backward_operator, (True, False)),
}


@pytest.mark.parametrize(("lengths", "rule"), [((5, 0, 3), "plain"), ((5, 0, 3), "all"), ((20, 20), "plain")], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, lengths, rule):
    forward, backward, more = OPERATORS[backend]
    case = Case(lengths, heads=2, kv_heads=1, head_dim=16, layout="left")
    layout = case.sequence_layout()
    q, k, v = (x.detach().requires_grad_() for x in case.inputs(torch.float32))
    arguments = (q, k, v, layout.starts, layout.lengths, *RULES[rule])
    torch.library.opcheck(forward, (*arguments, *more))
    detached = tuple(x.detach() for x in (q, k, v))
    out, lse = forward(*detached, *arguments[3:], *more)
    torch.library.opcheck(
        backward, (torch.ones_like(out), *detached, out, lse, *arguments[3:]),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


@pytest.mark.parametrize("rule", [{}, {"dropout_p": 0.3}, {"window": 4, "softcap": 5.0}], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_it_compiles_whole_and_only_once_as_lengths_change(backend, rule):
    torch._dynamo.reset()
    counters.clear()

    @torch.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    def step(q, k, v, layout):
        return attention(q * 2, k, v, layout, backend=backend, **rule).square().sum()

    # PyTorch itself specialises on one sequence, and on sizes that happen to be equal (rows and head size, say).
    for lengths in ((5, 9, 3), (4, 1, 30, 7), (0, 17, 6), (3, 3, 3, 3, 50)):
        case = Case(lengths, heads=2, kv_heads=1, head_dim=16)
        q, k, v = (x.detach().requires_grad_() for x in case.inputs(torch.float32))
        loss = step(q, k, v, case.sequence_layout())
        loss.backward()
        if not rule.get("dropout_p"):
            expected = attention(q * 2, k, v, case.sequence_layout(), backend="reference", **rule).square().sum()
            torch.testing.assert_close(loss, expected)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpointing_repeats_the_same_dropout(backend):
    case = Case((20, 7))
    layout = case.sequence_layout()

    def loss(*tensors):
        return attention(*tensors, layout, dropout_p=0.5, backend=backend).square().sum()

    gradients = []
    for run in (loss, lambda *tensors: checkpoint(loss, *tensors, use_reentrant=False)):
        torch.manual_seed(0)
        tensors = [x.detach().requires_grad_() for x in case.inputs(torch.float32)]
        gradients.append(torch.autograd.grad(run(*tensors), tensors))
    assert all(torch.equal(x, y) for x, y in zip(*gradients, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_reaches_forward_and_backward(backend):
    case = Case((20, 7))
    tensors = [x.detach().requires_grad_() for x in case.inputs(torch.float32)]
    with torch.autocast("cpu", dtype=torch.float16):
        out = attention(*tensors, case.sequence_layout(), backend=backend)
    assert out.dtype == torch.float16
    assert all(x.dtype == torch.float32 for x in torch.autograd.grad(out.float().sum(), tensors))


def test_the_log_sum_exp_carries_no_gradient():
    case = Case((20, 7))
    tensors = [x.detach().requires_grad_() for x in case.inputs(torch.float32)]
    for backend in ("reference", "blocked", "triton"):
        _, lse = attention(*tensors, case.sequence_layout(), return_lse=True, backend=backend)
        assert not lse.requires_grad
