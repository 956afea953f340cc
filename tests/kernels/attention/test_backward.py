"""Gradients of q, k and v are as exact as plain PyTorch's in the same dtype, whatever the layout and rule."""

import math

import pytest
import torch
from attention_cases import LAYOUTS, Case, make_layout, planned, three_ways
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import GRADIENT_FACTOR, assert_error_within
from pairwise import pairwise

from llm2vec_fast.kernels.attention import attention, configurations

LENGTHS = (70, 0, 1, 129)
DROPOUT = {"dropout_p": 0.3, "seed": 5}
# Any two of these meet.
PLAN = pairwise(
    heads=[(1, 1), (2, 1), (4, 2)],
    head_dim=[64, 40, 80, 96, 128, 256],
    settings=[
        {},
        {"window": 3},
        {"causal": True, "window": 5},
        {"softcap": 2.0, "window": 9, "scale": 0.5},
        DROPOUT,
        {**DROPOUT, "causal": True},
    ],
    lengths=[(17, 4), (3, 0, 20)],
    layout=LAYOUTS,
    half=[True, False],
)
HEADS = pairwise(
    heads=[(heads, 1) for heads in range(1, 9)],
    settings=[{}, {"causal": True}],
    lengths=[(17, 4), (3, 0, 20)],
    layout=["packed", "both"],
    half=[True, False],
)
# Texts of several tiles, and edges.
CASES = [
    *(Case(LENGTHS, settings={"causal": True, "window": window}) for window in (None, 40)),
    Case(LENGTHS, heads=4, kv_heads=2, layout="right", settings={"window": 20}),
    Case(LENGTHS, heads=4, kv_heads=2, settings={"softcap": 2.0, "window": 50, "scale": 0.5}),
    Case((100, 90), heads=2, settings={"window": 4}),  # padding queries of the shorter see nothing but padding
    Case((64, 128), settings=DROPOUT),
    Case(LENGTHS, heads=4, layout="left", settings={**DROPOUT, "causal": True, "window": 20}),
]
SMALL = [Case((33, 0, 1, 65), layout="both"), Case((70, 3), head_dim=16), Case((0,)), Case(())]
DTYPES = {"triton": (torch.float32, torch.float16), "blocked": (torch.float32, torch.bfloat16)}
HALF = {backend: half for backend, (_, half) in DTYPES.items()}
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


def assert_exact(case, backend, dtype):
    for name, *results in zip(("dq", "dk", "dv"), *three_ways(case, dtype, backend, call=gradients), strict=True):
        assert_error_within(*results, factor=GRADIENT_FACTOR, name=name)


@pytest.mark.parametrize(("case", "backend", "dtype"), planned([*PLAN, *HEADS], HALF))
def test_gradients_are_as_exact_as_pytorch(case, backend, dtype):
    assert_exact(case, backend, dtype)


@pytest.mark.parametrize("case", SMALL, ids=str)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_gradients_of_small_batches(case, backend, dtype):
    assert_exact(case, backend, dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("backend", "dtype"), HALF.items())
def test_gradients_of_texts_of_several_tiles(case, backend, dtype):
    assert_exact(case, backend, dtype)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 70), max_size=4),
    layout=st.sampled_from(LAYOUTS),
    causal=st.booleans(),
    window=st.none() | st.integers(0, 90),
    softcap=st.none() | st.floats(0.5, 50),
    dropout_p=st.sampled_from([0.0, 0.0, 0.5]),
    group=st.integers(1, 3),
    head_dim=st.integers(8, 40),
)
@pytest.mark.parametrize("backend", ["triton", "blocked"])
def test_gradients_of_generated_layouts_and_rules(
    backend, lengths, layout, causal, window, softcap, dropout_p, group, head_dim
):
    rule = {"causal": causal, "window": window, "softcap": softcap, "dropout_p": dropout_p, "seed": 3}
    assert_exact(Case(tuple(lengths), group, 1, head_dim, layout, rule), backend, torch.float32)


@pytest.mark.parametrize("layout", ["packed", "both"])
@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_gradcheck_in_float64(backend, layout):
    case = Case((5, 1, 0, 7), 2, 1, 3, layout, {"softcap": 2.0, "window": 3})
    made = case.sequence_layout()
    tensors = [x.detach().requires_grad_() for x in case.inputs(torch.float64)]
    assert torch.autograd.gradcheck(
        lambda *x: attention(*x, made, backend=backend, **case.settings), tensors, fast_mode=True
    )


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16 × 16, so that short texts pass through every loop of the kernels."""
    for name in ("forward", "backward_keys", "backward_queries"):
        monkeypatch.setattr(configurations, name, lambda *_: configurations.Configuration(16, 16, 4, 2))


@pytest.mark.parametrize("rule", [{}, {"window": 20}, {"causal": True}, {"causal": True, "window": 20}], ids=str)
def test_every_loop_of_the_kernels_with_small_tiles(small_tiles, rule):
    assert_exact(Case((70, 1, 16), 2, 1, 16, "both", rule), "triton", torch.float32)


@pytest.mark.parametrize("backend", ["triton", "blocked"])
def test_gradients_where_every_logit_is_very_negative(backend):
    case = Case((40, 70), head_dim=16, settings={"scale": 100.0})
    q, k, v = case.inputs(torch.float32)
    q, k = q * 0.1, k * 0.1
    q[..., 0], k[..., 0] = 100, -0.03  # logits of −300: without care the zero keys past the end would weigh e^300
    results = three_ways(case, torch.float32, backend, (q, k, v), call=gradients)
    for name, *three in zip(("dq", "dk", "dv"), *results, strict=True):
        assert_error_within(*three, factor=GRADIENT_FACTOR, name=name)


@pytest.mark.parametrize("softcap", [None, 20000.0])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_gradients_at_logits_of_ten_thousand(backend, dtype, softcap):
    case = Case((65, 20), head_dim=64, settings={"scale": 1.0, "softcap": softcap})
    q, k, v = case.inputs(dtype)
    q, k = q * 0.35, k * 0.35
    q[..., 0], k[..., 0] = 100, torch.where(k[..., 0] > 0, 100, -100)  # logits of ±10,000, and ordinary differences
    for name, *three in zip(
        ("dq", "dk", "dv"), *three_ways(case, dtype, backend, (q, k, v), call=gradients), strict=True
    ):
        assert_error_within(*three, factor=GRADIENT_FACTOR, name=name)


@pytest.mark.parametrize("backend", ["triton", "blocked"])
def test_gradients_where_every_row_has_a_single_key(backend):
    case = Case((65, 1, 130))
    q, k, v = case.inputs(torch.float32)
    dq, dk, dv = gradients(q, k, v, case.sequence_layout(), window=0, backend=backend)
    upstream = torch.randn(dv.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float16).float()
    assert backend == "triton" or torch.equal(dv, upstream)
    # The interpreter rounds a transposed product otherwise, so that a score differs from its maximum by its rounding.
    logit = (q * k).sum(-1).abs().max() * case.head_dim**-0.5 * math.log2(math.e)
    assert (dv - upstream).abs().max() <= (1 + logit) * torch.finfo(torch.float32).eps * upstream.abs().max()
    # Weights of 1 have no slope: dq and dk are the rounding of two sums of head_dim products that should cancel.
    rounding = 2 * case.head_dim * torch.finfo(torch.float32).eps * (upstream.abs() * v.abs()).sum(-1).max()
    for gradient, factor in ((dq, k), (dk, q)):
        assert gradient.abs().max() <= rounding * factor.abs().max() * case.head_dim**-0.5


@pytest.mark.parametrize("backend", ["blocked", "triton"])
def test_texts_that_share_a_padded_call_have_the_gradients_they_have_alone(backend):
    lengths = (40, 38, 37, 40, 36) if backend == "blocked" else (20, 18, 17)
    assert_exact(Case(lengths, heads=4, kv_heads=2), backend, torch.float32)


@pytest.mark.parametrize("rule", [{}, DROPOUT], ids=str)
@pytest.mark.parametrize("backend", ["triton", "blocked"])
def test_two_backward_passes_give_the_same_bits(backend, rule):
    case = Case((40, 20), heads=2, kv_heads=1)
    first, second = (
        gradients(*case.inputs(torch.float32), case.sequence_layout(), backend=backend, **rule) for _ in range(2)
    )
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", ["triton", "blocked"])
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
