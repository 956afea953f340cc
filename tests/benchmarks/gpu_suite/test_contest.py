"""A contender is compared with the exact result before anything is timed, and a wrong one has no time."""

import pytest
import torch

from benchmarks.gpu.contest import Contender, Work, compete
from benchmarks.gpu.section import NotAvailableError
from benchmarks.gpu.targets import goals
from llm2vec_fast.kernels.dispatch import BackendUnavailableError


class StubClock:
    """Says two milliseconds, and counts what it was asked to time."""

    def __init__(self):
        self.timed = 0

    def milliseconds(self, work):
        work()
        self.timed += 1
        return 2.0


def _square(x):
    return x * x


def _contender(forward):
    x = torch.arange(1.0, 5.0, dtype=torch.float32).requires_grad_()
    return Contender(forward, (x,), (torch.ones(4),))


def _work():
    truths = []
    for dtype in (torch.float64, torch.float32):
        x = torch.arange(1.0, 5.0, dtype=dtype).requires_grad_()
        truths.append((_square(x).detach(), torch.autograd.grad(_square(x).sum(), x)[0]))
    return Work("squares", *truths, {"forward": 10.0, "backward": 20.0}, peak=20.0)


def _compete(forward):
    clock = StubClock()
    rows = list(compete(_work(), {"one": lambda: _contender(forward)}, clock, True))
    return rows, clock


def test_a_right_one_is_timed_forward_and_backward():
    rows, clock = _compete(_square)
    assert [(row["pass"], row["verdict"], row["rate"], row["of peak"]) for row in rows] == [
        ("forward", "right", 5.0, 0.25),
        ("backward", "right", 10.0, 0.5),
    ]
    assert clock.timed == 2


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return grad


@pytest.mark.parametrize(
    ("forward", "what"),
    [(lambda x: x * x * 1.001, "output 0"), (_WrongGradient.apply, "gradient 0"), (lambda x: x * torch.nan, "NaN")],
)
def test_a_wrong_one_is_named_and_never_timed(forward, what):
    rows, clock = _compete(forward)
    assert [row["verdict"] for row in rows] == ["wrong"]
    assert what in rows[0]["note"]
    assert "ms" not in rows[0]
    assert clock.timed == 0


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (NotAvailableError("no cuDNN"), "not available"),
        (BackendUnavailableError("no Triton"), "not available"),
        (torch.OutOfMemoryError("too much"), "out of memory"),
    ],
)
def test_one_that_cannot_run_is_named_and_the_next_one_runs(error, verdict):
    def broken():
        raise error

    rows = list(compete(_work(), {"broken": broken, "one": lambda: _contender(_square)}, StubClock(), True))
    assert [row["verdict"] for row in rows] == [verdict, "right", "right"]


def _row(case, contender, which, **figures):
    return {"case": case, "contender": contender, "pass": which, **figures}


def test_targets_are_judged_by_the_rows():
    sections = {
        "attention": {
            "rows": [
                _row("D128, 16384", "ours, Triton", "forward", rate=400.0, ms=1.0),
                _row("D128, real", "ours, Triton", "forward", rate=1.0, ms=1.0),
                _row("D128, real", "SDPA, padded", "forward", rate=1.0, ms=3.0),
                {"case": "D128, real", "contender": "flash-attn", "verdict": "not available"},
            ]
        },
        "linear_cross_entropy": {
            "rows": [
                _row("V, 20% labelled", "ours, Triton", "both", **{"ms": 1.0, "peak extra MiB": 10.0}),
                _row("V, 100% labelled", "ours, Triton", "both", **{"ms": 1.0, "peak extra MiB": 10.0}),
                _row("V, 100% labelled", "logits of every row", "both", **{"ms": 1.2, "peak extra MiB": 1000.0}),
            ]
        },
        "rms_norm": {"rows": [_row("x", "ours, Triton", "forward", **{"of peak": 0.9, "ms": 1.0})]},
    }
    judged = {goal.name: goal.reached for goal in goals(sections)}
    assert judged["attention forward, D128, 16384, over FlashAttention-2"] is True
    assert judged["attention forward, D128, 16384, 70 % of FlashAttention-3"] is False
    assert judged["attention backward, D128, 16384, over FlashAttention-2"] is None
    assert judged["attention forward, D128, real lengths, against padded SDPA"] is True
    assert judged["cross-entropy, against logits written out"] is False
    assert judged["its memory, against theirs"] is True
    assert judged["rms_norm forward"] is True
    assert judged["swiglu forward"] is None
