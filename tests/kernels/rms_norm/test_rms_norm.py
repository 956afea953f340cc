"""RMSNorm: as exact as PyTorch in the same dtype, forward and backward, alone and behind an addition."""

from __future__ import annotations

import pytest
import torch
from elementwise_cases import BACKEND_IDS, BACKENDS, assert_as_exact, without_gradients
from torch import Tensor
from torch._dynamo.utils import counters

from llm2vec_fast.kernels import rms_norm
from llm2vec_fast.kernels.dispatch import BackendUnavailableError
from llm2vec_fast.kernels.rms_norm.operator import (
    add_rms_norm_operator,
    rms_norm_backward_operator,
    rms_norm_operator,
)

SHAPES = [(1, 3), (7, 40), (70, 576), (2, 3, 33), (3, 5000), (0, 8)]
EPS = 1e-6


def inputs(shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """x, residual and weight."""
    generator = torch.Generator().manual_seed(0)
    x, residual = ((torch.randn(shape, generator=generator) * scale).to(dtype) for _ in range(2))
    return x, residual, torch.randn(shape[-1], generator=generator).to(dtype)


def norm(offset: float):
    return lambda x, weight, backend: rms_norm(x, weight, EPS, offset=offset, backend=backend)


def add_and_norm(x: Tensor, residual: Tensor, weight: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return rms_norm(x, weight, EPS, residual, backend=backend)


@pytest.mark.parametrize(("scale", "offset"), [(1e-3, 1.0), (1.0, 0.0), (100.0, 1.0)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS, ids=BACKEND_IDS)
def test_as_exact_as_pytorch(backend, dtype, shape, scale, offset) -> None:
    x, _, weight = inputs(shape, dtype, scale)
    assert_as_exact(norm(offset), (x, weight), backend)
    without_gradients(norm(offset), (x, weight), backend)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS, ids=BACKEND_IDS)
def test_with_a_residual_it_is_as_exact_and_returns_the_sum(backend, dtype, shape) -> None:
    assert_as_exact(add_and_norm, inputs(shape, dtype), backend)


def test_the_widest_rows_of_the_kernel() -> None:
    tensors = inputs((17, 9000), torch.float16)  # more rows than programs: each sums the weight's gradient over several
    assert_as_exact(add_and_norm, tensors, "triton")
    assert_as_exact(norm(1.0), (tensors[0][:2], tensors[2]), "triton")


@pytest.mark.parametrize("backend", ["blocked", "triton"])
def test_rows_of_one_column(backend) -> None:
    x, _, weight = inputs((5, 1), torch.float32)
    without_gradients(norm(0.0), (x, weight), backend)  # the gradients cancel to nothing


@pytest.mark.parametrize("backend", ["blocked", "triton"])
def test_strided_rows_are_read_in_place(backend) -> None:
    wide = torch.randn(6, 3, 96, generator=torch.Generator().manual_seed(1))
    assert_as_exact(norm(0.0), (wide[..., 32:64], torch.ones(32)), backend)
    assert_as_exact(norm(0.0), (wide.transpose(0, 1), torch.ones(96)), backend)


@pytest.mark.parametrize("backend", ["blocked", "triton"])
def test_a_frozen_weight_has_no_gradient_and_the_rows_have_the_same(backend) -> None:
    x, _, weight = (t.requires_grad_() for t in inputs((9, 40), torch.float32))
    (both,) = torch.autograd.grad(rms_norm(x, weight, EPS, backend=backend).square().sum(), x)
    out = rms_norm(x, weight.detach(), EPS, backend=backend)
    assert torch.equal(torch.autograd.grad(out.square().sum(), x)[0], both)


@pytest.mark.parametrize("backend", ["blocked", "triton"])
def test_many_rows_give_the_same_weight_gradient_bits_every_time(backend) -> None:
    x, _, weight = (t.requires_grad_() for t in inputs((5000, 33), torch.float32))
    first, second = (
        torch.autograd.grad(rms_norm(x, weight, EPS, backend=backend).square().sum(), weight)[0] for _ in range(2)
    )
    assert torch.equal(first, second)
    assert_as_exact(norm(0.0), inputs((5000, 33), torch.float32)[::2], backend)


def test_rows_of_zeros_and_huge_rows_stay_finite() -> None:
    rows = torch.stack([torch.zeros(8), torch.full((8,), 3e38)]).bfloat16()
    out = rms_norm(rows, torch.ones(8).bfloat16(), 1e-6, backend="blocked")
    assert torch.equal(out[0], torch.zeros(8).bfloat16())
    assert bool(out.isfinite().all())


@pytest.mark.parametrize("backend", ["blocked", "triton"])
def test_the_inputs_are_not_written_to(backend) -> None:
    for dtype in (torch.float32, torch.float16):
        tensors = [t.requires_grad_() for t in inputs((4, 8), dtype)]
        before = [t.detach().clone() for t in tensors]
        out, total = add_and_norm(*tensors, backend)
        (out.sum() + total.sum()).backward()
        assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_gradcheck(backend) -> None:
    x, residual, weight = (t.double().requires_grad_() for t in inputs((3, 5), torch.float64))
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, EPS, offset=1.0, backend=backend), (x, weight))
    assert torch.autograd.gradcheck(lambda *t: add_and_norm(*t, backend), (x, residual, weight))


@pytest.mark.parametrize("triton", [False, True], ids=["blocked", "triton"])
def test_opcheck(triton) -> None:
    x, residual, weight = (t.requires_grad_() for t in inputs((5, 24), torch.float32))
    torch.library.opcheck(rms_norm_operator, (x, weight, EPS, 0.0, triton))
    torch.library.opcheck(add_rms_norm_operator, (x, residual, weight, EPS, 1.0, triton))
    x, grad, weight = (t.detach() for t in (x, residual, weight))
    for weight_gradient in (True, False):
        torch.library.opcheck(
            rms_norm_backward_operator, (grad, None, x, weight, torch.ones(5), 0.0, weight_gradient, triton),
            test_utils=("test_schema", "test_faketensor"),
        )  # fmt: skip


@pytest.mark.parametrize("backend", ["blocked", "triton"])
def test_it_compiles_whole_and_only_once_as_rows_change(backend) -> None:
    torch._dynamo.reset()
    counters.clear()

    @torch.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    def step(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        out, total = add_and_norm(x * 2, residual, weight, backend)
        return (rms_norm(out, weight, EPS, backend=backend) * total).sum()

    for rows in (5, 64, 700, 3):
        tensors = [t.requires_grad_() for t in inputs((rows, 24), torch.float32)]
        loss = step(*tensors)
        loss.backward()
        out, total = add_and_norm(tensors[0] * 2, *tensors[1:], "reference")
        torch.testing.assert_close(loss, (rms_norm(out, tensors[2], EPS, backend="reference") * total).sum())
        with torch.no_grad():
            step(*tensors)
    assert counters["stats"]["unique_graphs"] == 2  # with gradients and without


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"weight": torch.ones(4)}, "8 columns"),
        ({"residual": torch.ones(3, 8)}, r"residual is \(3, 8\)"),
        ({"residual": torch.ones(2, 8).double()}, "float64"),
        ({"x": torch.ones(2, 0), "weight": torch.ones(0)}, r"x is \(2, 0\)"),
        ({"x": torch.tensor(1.0)}, r"x is \(\)"),
        ({"x": torch.ones(2, 8, dtype=torch.long)}, "torch.int64"),
        ({"eps": float("nan")}, "eps=nan"),
        ({"eps": -1e-6}, "eps=-1e-06"),
    ],
    ids=["weight", "rows", "dtype", "no-columns", "a-number", "integers", "nan", "negative"],
)
def test_what_does_not_fit_is_refused(change, says) -> None:
    with pytest.raises(ValueError, match=says):
        rms_norm(**{"x": torch.ones(2, 8), "weight": torch.ones(8), "eps": EPS, **change})


def test_rows_that_the_kernel_cannot_take_are_refused_with_the_reason_and_run_otherwise() -> None:
    wide, weight = torch.ones(1, 9000), torch.ones(9000)
    with pytest.raises(BackendUnavailableError, match=r"9000 columns.*8192"):
        rms_norm(wide, weight, EPS, backend="triton")
    with pytest.raises(BackendUnavailableError, match=r"16385 columns.*16384"):
        rms_norm(torch.ones(1, 16385).half(), torch.ones(16385).half(), EPS, backend="triton")
    with pytest.raises(BackendUnavailableError, match="float64"):
        rms_norm(torch.ones(1, 8).double(), torch.ones(8).double(), EPS, backend="triton")
    assert torch.allclose(rms_norm(wide, weight, EPS), wide)
