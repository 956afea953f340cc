"""Rotary embedding: as exact as PyTorch in the same dtype, whole or partial, on strided views, and differentiable."""

from __future__ import annotations

import pytest
import torch
from numerics import assert_error_within

from llm2vec_fast.kernels import rotary


def inputs(width: int, turned: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """q and k as views of one projection's output, (B, H, S, D), with the angles of their positions."""
    generator = torch.Generator().manual_seed(0)
    fused = torch.randn(2, 7, 6 * width, generator=generator).to(dtype)
    q, k = fused[..., : 4 * width], fused[..., 4 * width :]
    angles = torch.randn(2, 7, turned // 2, generator=generator, dtype=torch.float64).repeat(1, 1, 2)
    heads = [x.unflatten(2, (-1, width)).transpose(1, 2) for x in (q, k)]
    return [*heads, angles.cos().to(dtype), angles.sin().to(dtype)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("width", "turned"), [(8, 8), (64, 64), (80, 32), (40, 10)])
def test_blocked_is_as_exact_as_pytorch(width: int, turned: int, dtype: torch.dtype) -> None:
    given = inputs(width, turned, dtype)
    exact = rotary(*(x.double() for x in given), backend="reference")
    plain, ours = rotary(*given, backend="reference"), rotary(*given, backend="blocked")
    for name, mine, stock, true in zip("qk", ours, plain, exact, strict=True):
        assert_error_within(mine, stock, true, name=name)


def test_heads_may_come_after_positions() -> None:
    q, k, cos, sin = inputs(8, 8, torch.float32)
    swapped = rotary(q.transpose(1, 2), k.transpose(1, 2), cos, sin, unsqueeze_dim=2)
    for a, b in zip(swapped, rotary(q, k, cos, sin), strict=True):
        assert torch.equal(a.transpose(1, 2), b)


def test_the_input_is_not_written_to() -> None:
    given = inputs(8, 4, torch.float32)
    before = [x.clone() for x in given]
    rotary(*given, backend="blocked")
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


def test_it_is_differentiable() -> None:
    given = [x.detach().requires_grad_() for x in inputs(6, 4, torch.float64)]
    assert torch.autograd.gradcheck(rotary, given)
