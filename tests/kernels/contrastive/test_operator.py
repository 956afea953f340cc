"""The loss is a proper PyTorch operator, compiled whole and once, and stays small in memory."""

import multiprocessing
import resource
import sys

import pytest
import torch
from contrastive_cases import Case
from torch._dynamo.utils import counters

from llm2vec_fast.kernels import contrastive
from llm2vec_fast.kernels.contrastive import contrastive_loss
from llm2vec_fast.kernels.contrastive.operator import contrastive_backward_operator, contrastive_operator

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero", "ignore:overflow encountered")


@pytest.mark.parametrize("symmetric", [False, True], ids=["one-sum", "symmetric"])
@pytest.mark.parametrize("backend", ["blocked", "triton"])
def test_opcheck(backend, symmetric):
    case = Case(5, 7, 8, shared=True, same=True, known=2, guide=3 if backend == "blocked" else 0)
    queries, documents = (x.clone().requires_grad_() for x in case.inputs(torch.float32))
    scale = torch.tensor(20.0, requires_grad=True)
    guide, *targets = {"guide": (None, None), **case.targets()}.values()
    settings = (*targets, *guide, True, symmetric, True, not symmetric, -0.1, False, backend)
    torch.library.opcheck(contrastive_operator, (queries, documents, scale, *settings))
    plain = tuple(x.detach() for x in (queries, documents, scale))
    _, *saved = contrastive_operator(*plain, *settings)
    torch.library.opcheck(
        contrastive_backward_operator, (torch.ones(5), *saved, *plain, *settings, [True, False, True]),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


@pytest.mark.parametrize("rule", [{}, {"symmetric": True, "query_negatives": True}], ids=str)
@pytest.mark.parametrize("known", [False, True], ids=["plain", "known"])
@pytest.mark.parametrize("backend", ["auto", "blocked", "triton"])
def test_it_compiles_whole_and_only_once_as_the_batch_changes(backend, known, rule):
    torch._dynamo.reset()
    counters.clear()

    @torch.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    def step(queries, documents, scale, targets):
        return contrastive_loss(queries * 2, documents, scale=scale, backend=backend, **targets, **rule)

    # PyTorch itself specialises on sizes that happen to be equal (rows and width, say).
    for rows, documents, most in ((12, 20, 2), (5, 30, 6), (40, 41, 4), (3, 9, 7)):
        case = Case(rows, documents, 8, known=most if known else 0)
        tensors, targets = [x.clone().requires_grad_() for x in case.inputs(torch.float32)], case.targets()
        scale = torch.tensor(20.0, requires_grad=True)
        loss = step(*tensors, scale, targets)
        loss.backward()
        torch.testing.assert_close(loss, contrastive_loss(*tensors, backend="reference", **targets, **rule))
        assert scale.grad.isfinite()
    assert counters["stats"]["unique_graphs"] == 1


def test_auto_computes_small_batches_at_once_and_large_ones_in_tiles(monkeypatch):
    queries, documents = Case(20, 30, 8).inputs(torch.bfloat16)
    ways = []
    for name in ("whole_loss", "contrastive_reference", "contrastive_operator"):
        original = getattr(contrastive, name)
        monkeypatch.setattr(contrastive, name, lambda *x, f=original, n=name: ways.append((n, x[0].dtype)) or f(*x))

    def run(most, **rule):
        monkeypatch.setattr(contrastive, "WHOLE_BYTES", most)
        return contrastive_loss(queries, documents, **rule)

    run({"plain": 4 * 600, "other": 0})
    run({"plain": 4 * 599, "other": 0})
    run({"plain": 10**9, "other": 4 * 1000}, query_negatives=True)
    run({"plain": 10**9, "other": 4 * 999}, query_negatives=True)
    run({"plain": 10**9, "other": 4 * 599}, ids=torch.arange(30))
    assert ways == [
        ("whole_loss", torch.bfloat16),
        ("contrastive_operator", torch.bfloat16),
        ("contrastive_reference", torch.float32),
        ("contrastive_operator", torch.bfloat16),
        ("contrastive_operator", torch.bfloat16),
    ]


def test_autocast_leaves_the_loss_in_float32():
    queries, documents = Case(20, 30, 8).inputs(torch.float32)
    for backend in ("auto", "blocked"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = contrastive_loss(queries, documents, backend=backend)
        assert torch.equal(loss, contrastive_loss(queries, documents, backend=backend))


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of resident memory is in other units elsewhere")
def test_memory_grows_with_the_rows_and_not_with_their_product():
    rows, width = 8192, 32
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        extra = pool.apply(_extra_bytes, (rows, width, {"symmetric": True, "query_negatives": True}))
    matrix, linear = rows * rows * 4, 2 * rows * width * 4
    tiles = 64 * 2**20  # what a first call of PyTorch's products takes, with tiles of 2 MiB
    assert extra < 4 * linear + tiles < matrix / 3


def _extra_bytes(rows: int, width: int, rule: dict) -> int:
    """Growth of the peak of resident memory by a large call, beyond that of a small one."""
    for count in (600, rows):
        tensors = [torch.randn(count, width, requires_grad=True) for _ in range(2)]
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        contrastive_loss(*tensors, backend="blocked", **rule).backward()
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
