"""Rows as the Triton kernels multiply them: of about one length, and as exact as they were given."""

import pytest
import torch

from llm2vec_fast.kernels.contrastive.triton import prepared

ROUNDINGS = 4 * torch.finfo(torch.float32).eps  # of a length and its inverse, each rounded once or twice


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rows_that_a_margin_compares_are_not_rounded(dtype):
    sizes = torch.tensor([1.0, 1e-3, 999.0, 0.0])
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (4, 40), generator=generator) * 2 - 1
    x = ((0.5 + torch.rand(4, 40, generator=generator)) * signs * sizes[:, None]).to(dtype)
    level, inverse, stretch = prepared(x, True, True)
    exponents = (level[:3].double() / x[:3].double()).log2()
    assert torch.equal(exponents, exponents[:, :1].round().expand_as(exponents))
    lengths = level[:3].double().norm(dim=1)
    assert bool(((lengths >= 0.5) & (lengths <= 1)).all())
    torch.testing.assert_close(stretch[:3].double() * lengths, torch.ones_like(lengths), rtol=ROUNDINGS, atol=0)
    torch.testing.assert_close(
        inverse[:3].double() * x[:3].double().norm(dim=1), torch.ones_like(lengths), rtol=ROUNDINGS, atol=0
    )
    assert not level[3].any()
    assert stretch[3] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_other_rows_have_length_one(dtype):
    sizes = torch.tensor([1.0, 1e-3, 999.0] if dtype == torch.float16 else [1.0, 1e-36, 1e36])
    x = (torch.randn(3, 40, generator=torch.Generator().manual_seed(0)) * sizes[:, None]).to(dtype)
    unit, inverse, stretch = prepared(x, True, False)
    assert stretch is None
    expected = x.double() / x.double().norm(dim=1, keepdim=True)
    torch.testing.assert_close(unit.double(), expected, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).tiny)
    torch.testing.assert_close(
        inverse.double() * x.double().norm(dim=1), torch.ones(3).double(), rtol=ROUNDINGS, atol=0
    )
