"""The output is as exact as plain PyTorch in the same dtype, whatever the layout, heads, head size and rule."""

from functools import partial

import pytest
import torch
from attention_cases import LAYOUTS, Case, make_layout, planned, three_ways, uninitialised_memory_is_nan
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_error_within
from pairwise import pairwise

from llm2vec_fast.kernels.attention import attention, configurations

LONG = (129, 17, 200)
# Any two of these meet.
PLAN = pairwise(
    heads=[(1, 1), (2, 1), (4, 2)],
    head_dim=[64, 40, 80, 96, 128, 256],
    settings=[
        {},
        {"window": 3},
        {"causal": True},
        {"causal": True, "window": 5},
        {"softcap": 30.0},
        {"softcap": 2.0, "window": 9, "scale": 0.5},
    ],
    lengths=[(17, 4), (3, 0, 20, 1)],
    layout=LAYOUTS,
    half=[True, False],
)
HEADS = pairwise(
    heads=[(heads, 1) for heads in range(1, 9)],
    settings=[{}, {"causal": True}],
    lengths=[(17, 4), (3, 0, 20, 1)],
    layout=["packed", "both"],
    half=[True, False],
)
# One at a time: edges of tiles, and texts of several tiles.
EDGES = [
    *(Case((70, 3), head_dim=size) for size in (16, 72, 112)),
    *(Case(LONG, settings={"window": window}) for window in (0, 1, 63, 64, 128, 1000)),
    *(Case(LONG, settings={"causal": True, "window": window}) for window in (0, 31, 64, 1000)),
    *(Case(LONG, heads=4, kv_heads=2, layout=layout, settings={"causal": True}) for layout in ("packed", "both")),
    *(Case(LONG, layout=layout, settings={"softcap": 1.0}) for layout in ("left", "right")),
]
SIZES = [
    *(Case((length,)) for length in (1, 2, 63, 64, 65, 127, 128, 129)),
    Case((257,), heads=1, kv_heads=1),
    Case((129, 17), heads=2, kv_heads=1, head_dim=80, settings={"softcap": 2.0, "window": 50, "scale": 0.5}),
    Case(()),
    Case((0,)),
    Case((0, 0), layout="right"),
    Case((1,) * 40),
]
TRITON_DTYPES = (torch.float32, torch.float16)  # Triton's interpreter gets bfloat16 products wrong
BLOCKED_DTYPES = (torch.float32, torch.bfloat16)
BACKENDS = [
    pytest.param(backend, dtype, id=f"{backend}-{str(dtype).removeprefix('torch.')}")
    for backend, dtypes in (("triton", TRITON_DTYPES), ("blocked", BLOCKED_DTYPES))
    for dtype in dtypes
]
HALF = {"triton": torch.float16, "blocked": torch.bfloat16}
with_lse = partial(attention, return_lse=True)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16 × 16, so that short texts pass through every loop of the kernel."""
    monkeypatch.setattr(configurations, "forward", lambda *_: configurations.Configuration(16, 16, 4, 2))


def assert_exact(case, backend, dtype):
    for name, *results in zip(("output", "lse"), *three_ways(case, dtype, backend, call=with_lse), strict=True):
        assert_error_within(*results, name=name)


@pytest.mark.parametrize(("case", "backend", "dtype"), planned([*PLAN, *HEADS], HALF))
def test_output_and_lse_are_as_exact_as_pytorch(case, backend, dtype):
    assert_exact(case, backend, dtype)


@pytest.mark.parametrize("case", SIZES, ids=str)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_output_and_lse_of_every_size(case, backend, dtype):
    assert_exact(case, backend, dtype)


@pytest.mark.parametrize("case", EDGES, ids=str)
@pytest.mark.parametrize(("backend", "dtype"), HALF.items())
def test_output_and_lse_at_the_edges_of_tiles(case, backend, dtype):
    assert_exact(case, backend, dtype)


@pytest.mark.parametrize("rule", [{}, {"window": 20}, {"causal": True}, {"causal": True, "window": 20}], ids=str)
def test_every_loop_of_the_kernel_with_small_tiles(small_tiles, rule):
    for layout in ("packed", "both"):
        assert_error_within(*three_ways(Case((70, 1, 16, 33), 2, 1, 16, layout, rule), torch.float32, "triton"))


@settings(max_examples=12, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 80), max_size=4),
    layout=st.sampled_from(LAYOUTS),
    causal=st.booleans(),
    window=st.none() | st.integers(0, 90),
    softcap=st.none() | st.floats(0.5, 50),
    group=st.integers(1, 3),
    head_dim=st.integers(1, 40),
)
@pytest.mark.parametrize("backend", ["triton", "blocked"])
def test_generated_layouts_and_rules(backend, lengths, layout, causal, window, softcap, group, head_dim):
    rule = {"causal": causal, "window": window, "softcap": softcap}
    assert_error_within(*three_ways(Case(tuple(lengths), group, 1, head_dim, layout, rule), torch.float32, backend))


@pytest.mark.parametrize("softcap", [None, 20000.0])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_logits_of_ten_thousand(backend, dtype, softcap):
    case = Case((65, 20), head_dim=64, settings={"scale": 1.0, "softcap": softcap})
    q, k, v = case.inputs(dtype)
    q, k = q * 0.35, k * 0.35
    q[..., 0], k[..., 0] = 100, torch.where(k[..., 0] > 0, 100, -100)  # logits of ±10,000, and ordinary differences
    assert_error_within(*three_ways(case, dtype, backend, (q, k, v)))


@pytest.mark.parametrize("backend", ["triton", "blocked"])
def test_a_row_with_a_single_key_returns_its_value(backend):
    case = Case((65, 1, 130), settings={"window": 0})
    q, k, v = case.inputs(torch.float32)
    out = attention(q, k, v, case.sequence_layout(), window=0, backend=backend)
    assert_error_within(out, v, v.double())
    assert backend == "triton" or torch.equal(out, v)  # the running softmax rounds once


@pytest.mark.parametrize("rule", [{}, {"window": 9}, {"causal": True}], ids=str)
@pytest.mark.parametrize("backend", ["triton", "blocked"])
def test_a_packed_text_equals_the_text_alone_whatever_its_neighbours_hold(backend, rule):
    case = Case((40, 70, 3, 40))
    layout = case.sequence_layout()
    q, k, v = case.inputs(torch.float32)
    alone = [
        attention(q[rows], k[rows], v[rows], make_layout("packed", (length,)), backend=backend, **rule)
        for rows, length in _sequences(layout)
    ]
    for x in (q, k, v):
        x[40:110] = float("nan")  # the second text is broken: the others must not notice
    together = attention(q, k, v, layout, backend=backend, **rule)
    for i in (0, 2, 3):
        rows, _ = list(_sequences(layout))[i]
        torch.testing.assert_close(together[rows], alone[i])


@pytest.mark.parametrize("backend", ["triton", "blocked"])
@pytest.mark.parametrize("layout", ["left", "right", "both"])
def test_padding_is_never_read_and_comes_out_as_zeros(backend, layout):
    case = Case((40, 7, 0), layout=layout)
    made = case.sequence_layout()
    q, k, v = case.inputs(torch.float32)
    clean = attention(q, k, v, made, backend=backend)
    padding = made.sequence_ids < 0
    for x in (q, k, v):
        x[padding] = float("nan")
    with uninitialised_memory_is_nan():
        out = attention(q, k, v, made, backend=backend)
    assert torch.equal(out, clean)
    assert not out[padding].any()


def test_views_of_a_padded_batch_are_read_without_a_copy(monkeypatch):
    batch, length, heads, size = 2, 24, 2, 16
    q, k, v = (torch.randn(batch, length, heads * size) for _ in range(3))
    flat = [x.view(batch, length, heads, size).flatten(0, 1) for x in (q, k, v)]
    assert all(x.data_ptr() == y.data_ptr() for x, y in zip(flat, (q, k, v), strict=True))
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda self: pytest.fail("copied"))
    attention(*flat, make_layout("right", (24, 20)), backend="triton")


@pytest.mark.parametrize("dtype", BLOCKED_DTYPES, ids=str)
@pytest.mark.parametrize("rule", [{}, {"window": 9}, {"causal": True}], ids=str)
def test_without_gradients_blocked_gives_a_packed_text_the_bits_it_has_alone(rule, dtype):
    case = Case((300, 40, 3, 40, 16, 16, 16, 40, 1030), heads=6, kv_heads=2, head_dim=64)
    layout = case.sequence_layout()
    tensors = case.inputs(dtype)
    together = attention(*tensors, layout, backend="blocked", **rule)
    for rows, length in _sequences(layout):
        alone = attention(*(x[rows] for x in tensors), make_layout("packed", (length,)), backend="blocked", **rule)
        assert torch.equal(together[rows], alone)


@pytest.mark.parametrize("rule", [{}, {"dropout_p": 0.3, "seed": 5}], ids=str)
@pytest.mark.parametrize("backend", ["reference", "blocked", "triton"])
def test_two_runs_give_the_same_bits(backend, rule):
    case = Case((70, 7), heads=2, kv_heads=1)
    q, k, v = case.inputs(torch.float32)
    first, second = (attention(q, k, v, case.sequence_layout(), backend=backend, **rule) for _ in range(2))
    assert torch.equal(first, second)


def _sequences(layout):
    for start, length in zip(layout.starts.tolist(), layout.lengths.tolist(), strict=True):
        yield slice(start, start + length), length
