"""RMSNorm: as exact as PyTorch in the same dtype, for every dtype, and differentiable."""

from __future__ import annotations

import pytest
import torch
from numerics import assert_error_within

from llm2vec_fast.kernels import rms_norm

SHAPES = [(1, 1), (7, 40), (300, 576), (2, 3, 33)]


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_blocked_is_as_exact_as_pytorch(shape: tuple, scale: float, dtype: torch.dtype, offset: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=generator) * scale).to(dtype)
    weight = torch.randn(shape[-1], generator=generator).to(dtype)
    exact = rms_norm(x.double(), weight.double(), 1e-6, offset=offset, backend="reference")
    plain = rms_norm(x, weight, 1e-6, offset=offset, backend="reference")
    assert_error_within(rms_norm(x, weight, 1e-6, offset=offset, backend="blocked"), plain, exact)


def test_rows_of_zeros_and_huge_rows_stay_finite() -> None:
    rows = torch.stack([torch.zeros(8), torch.full((8,), 3e38)]).bfloat16()
    out = rms_norm(rows, torch.ones(8).bfloat16(), 1e-6)
    assert torch.equal(out[0], torch.zeros(8).bfloat16())


def test_the_input_is_not_written_to() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = torch.randn(4, 8).to(dtype), torch.randn(8).to(dtype)
        before = x.clone(), weight.clone()
        rms_norm(x, weight, 1e-6, backend="blocked")
        assert torch.equal(x, before[0])
        assert torch.equal(weight, before[1])


def test_it_is_differentiable() -> None:
    x, weight = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 5), (5,)))
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-6, offset=1.0), (x, weight))


def test_a_weight_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match="8 columns"):
        rms_norm(torch.ones(2, 8), torch.ones(4), 1e-6)
