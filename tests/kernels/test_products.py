"""16-bit products in float32, block by block, for CPUs that have no instructions for them."""

from __future__ import annotations

import pytest
import torch
from numerics import assert_error_within

from llm2vec_fast.kernels import products
from llm2vec_fast.kernels.products import is_widened, multiplies, widened_product

# rows, depth and columns: flat, deep, wide and square, one block and several with odd ends
SHAPES = [(1, 1, 1), (3, 40, 7), (700, 5, 3), (5, 1300, 2), (2, 3, 5000), (530, 540, 550)]


def matrices(shape, dtype, transposed):
    rows, depth, columns = shape
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n + 3, m + 5, generator=generator).to(dtype) for n, m in ((rows, depth), (depth, columns)))
    if transposed:  # rows and columns change places in memory
        a, b = a.T.contiguous().T, b.T.contiguous().T
    return a[1 : rows + 1, 2 : depth + 2], b[1 : depth + 1, 2 : columns + 2]


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_as_exact_as_a_product_in_float32_rounded_once(monkeypatch, shape, dtype, transposed):
    monkeypatch.setattr(products, "BLOCK_ELEMENTS", 128 * 128)
    monkeypatch.setattr(products, "BLOCK_SIDE", 128)
    a, b = matrices(shape, dtype, transposed)
    bias = torch.linspace(-2, 2, shape[2]).to(dtype)
    out = torch.full((shape[0] + 2, shape[2] + 2), float("nan"), dtype=dtype)[1:-1, 1:-1]
    widened_product(a, b, out, bias=bias, scale=0.3)
    exact = 0.3 * (a.double() @ b.double()) + bias
    plain = (0.3 * (a.float() @ b.float()) + bias).to(dtype)
    assert_error_within(out, plain, exact)


def test_it_adds_to_a_wider_sum():
    a, b = matrices((70, 80, 90), torch.bfloat16, False)
    out = torch.ones(70, 90)
    widened_product(a, b, out, add=True)
    assert_error_within(out, 1 + a.float() @ b.float(), 1 + a.double() @ b.double())


@pytest.mark.parametrize("variable", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"])
def test_instructions_that_onednn_may_not_use_do_not_count(monkeypatch, variable):
    monkeypatch.setenv(variable, "avx2")
    multiplies.cache_clear()
    try:
        widened = [is_widened(torch.ones(1, dtype=dtype)) for dtype in (torch.bfloat16, torch.float16, torch.float32)]
    finally:
        multiplies.cache_clear()
    assert widened == [True, True, False]


@pytest.mark.parametrize("probes", [True, False])
def test_without_a_limit_the_processor_decides(monkeypatch, probes):
    for variable in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(variable, raising=False)
    for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, probe, lambda: probes, raising=False)
    multiplies.cache_clear()
    try:
        assert multiplies(torch.bfloat16) == probes
    finally:
        multiplies.cache_clear()
