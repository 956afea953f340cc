"""Gradients of q, k and v are as exact as plain PyTorch's in the same dtype, whatever the layout and rule."""

import pytest
import torch
from attention_cases import LAYOUTS, Case, make_layout, three_ways
from numerics import GRADIENT_FACTOR, assert_error_within

from llm2vec_fast.kernels.attention import attention

LENGTHS = (70, 0, 1, 129)
CASES = [
    *(Case(LENGTHS, heads=4, kv_heads=2, layout=layout, settings={"window": 20}) for layout in LAYOUTS),
    *(Case(LENGTHS, layout=layout) for layout in LAYOUTS),
    *(Case((40, 9), heads=heads, kv_heads=1) for heads in (3, 8)),
    *(Case((70, 3), head_dim=size) for size in (16, 40, 64, 80, 128, 256)),
    *(Case(LENGTHS, settings={"causal": True, "window": window}) for window in (None, 0, 40)),
    Case(LENGTHS, heads=4, kv_heads=2, settings={"softcap": 2.0, "window": 50, "scale": 0.5}),
    Case((64, 128)),
    Case((0,)),
    Case(()),
]
DTYPES = {"blocked": (torch.float32, torch.bfloat16)}
BACKENDS = [
    pytest.param(backend, dtype, id=f"{backend}-{str(dtype).removeprefix('torch.')}")
    for backend, dtypes in DTYPES.items()
    for dtype in dtypes
]


def gradients(q, k, v, layout, **settings):
    """dq, dk, dv for an upstream gradient that is the same in every dtype."""
    tensors = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attention(*tensors, layout, **settings)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float16)
    return torch.autograd.grad(out, tensors, upstream.to(out.dtype))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_gradients_are_as_exact_as_pytorch(case, backend, dtype):
    for name, *results in zip(("dq", "dk", "dv"), *three_ways(case, dtype, backend, call=gradients), strict=True):
        assert_error_within(*results, factor=GRADIENT_FACTOR, name=name)


@pytest.mark.parametrize("layout", ["packed", "both"])
@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_gradcheck_in_float64(backend, layout):
    case = Case((5, 1, 0, 7), 2, 1, 3, layout, {"softcap": 2.0, "window": 3})
    made = case.sequence_layout()
    tensors = [x.detach().requires_grad_() for x in case.inputs(torch.float64)]
    assert torch.autograd.gradcheck(
        lambda *x: attention(*x, made, backend=backend, **case.settings), tensors, fast_mode=True
    )


@pytest.mark.parametrize("backend", ["blocked"])
def test_a_broken_text_leaves_the_gradients_of_its_neighbours_alone(backend):
    case = Case((40, 70, 3))
    layout = case.sequence_layout()
    tensors = case.inputs(torch.float32)
    alone = gradients(*(x[:40] for x in tensors), make_layout("packed", (40,)), backend=backend)
    for x in tensors:
        x[40:110] = float("nan")
    together = gradients(*tensors, layout, backend=backend)
    for ours, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(ours[:40], expected)
