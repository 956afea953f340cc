"""Pooling: the definition, the tolerance rule, gradients, layouts and degenerate sequences."""

from __future__ import annotations

import pytest
import torch
from attention_cases import uninitialised_memory_is_nan
from elementwise_cases import BACKENDS
from numerics import GRADIENT_FACTOR, assert_error_within
from pairwise import pairwise
from torch import Tensor
from torch._dynamo.utils import counters

from llm2vec_fast.kernels.dispatch import BackendUnavailableError
from llm2vec_fast.kernels.layout import SequenceLayout
from llm2vec_fast.kernels.pooling import POOLING_MODES, pool
from llm2vec_fast.kernels.pooling.operator import pool_backward_operator, pool_operator

MODES = ("mean", "weighted_mean", "mean_sqrt_len", "max", "last", "first")
FAST = ("blocked", "triton")
LENGTHS = {
    "one": [1],
    "mixed": [3, 0, 17, 1, 64],
    "all-empty": [0, 0],
    "long": [3001],
    "long-among-short": [150, *[2] * 12, 70, 0, 1],
}
MANY = [int(n) for n in torch.randint(0, 6, (10_000,), generator=torch.Generator().manual_seed(1))]


def packed(lengths: list[int], width: int, dtype: torch.dtype) -> tuple[Tensor, SequenceLayout, Tensor]:
    generator = torch.Generator().manual_seed(0)
    layout = SequenceLayout.from_lengths(lengths)
    hidden = torch.randn(layout.total, width, generator=generator).to(dtype)
    skip = torch.randint(0, 4, (len(lengths),), generator=generator)
    return hidden, layout, skip


PLAN = pairwise(lengths=LENGTHS, mode=MODES, skipping=[False, True], backend=range(len(BACKENDS)))


@pytest.mark.parametrize(
    ("lengths", "mode", "skipping", "backend", "dtype"),
    [pytest.param(x["lengths"], x["mode"], x["skipping"], *BACKENDS[x["backend"]]) for x in PLAN],
)
def test_as_exact_as_the_definition_in_the_same_dtype(lengths, mode, skipping, backend, dtype):
    lengths = LENGTHS[lengths]
    hidden, layout, skip = packed(lengths, 40, dtype)
    skip = skip if skipping else None
    upstream = torch.randn(len(lengths), 40, generator=torch.Generator().manual_seed(2))
    results = {}
    for name, x, which in (
        ("exact", hidden.double(), "reference"),
        ("plain", hidden, "reference"),
        ("ours", hidden, backend),
    ):
        x = x.clone().requires_grad_()
        with uninitialised_memory_is_nan():
            out = pool(x, layout, mode, skip, backend=which)
            (gradient,) = torch.autograd.grad(out, x, upstream.to(out.dtype))
        results[name] = (out, gradient)
    ours, plain, exact = results["ours"], results["plain"], results["exact"]
    assert ours[0].dtype == torch.float32
    assert_error_within(ours[0], plain[0], exact[0])
    assert_error_within(ours[1], plain[1], exact[1], factor=GRADIENT_FACTOR, name="gradient")


@pytest.mark.parametrize("mode", MODES)
def test_ten_thousand_sequences(mode):
    hidden, layout, skip = packed(MANY, 24, torch.bfloat16)
    exact = pool(hidden.double(), layout, mode, skip, backend="reference")
    assert_error_within(pool(hidden, layout, mode, skip), pool(hidden, layout, mode, skip, backend="reference"), exact)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_without_a_gradient_the_bits_are_the_same(lengths, mode):
    hidden, layout, skip = packed(lengths, 40, torch.bfloat16)
    with torch.no_grad():
        out = pool(hidden, layout, mode, skip)
    assert torch.equal(out, pool(hidden.requires_grad_(), layout, mode, skip))


@pytest.mark.parametrize("mode", ["mean", "max", "last"])
def test_many_wide_sequences_on_triton(mode):
    hidden, layout, skip = packed(MANY[:80], 300, torch.float16)
    exact = pool(hidden.double(), layout, mode, skip, backend="reference")
    plain = pool(hidden, layout, mode, skip, backend="reference")
    assert_error_within(pool(hidden, layout, mode, skip, backend="triton"), plain, exact)


@pytest.mark.parametrize("backend", FAST)
def test_strided_rows_are_read_in_place(backend):
    hidden, layout, skip = packed([3, 0, 17], 40, torch.float32)
    part = hidden[:, 8:24]
    assert torch.equal(
        pool(part, layout, "mean", skip, backend=backend), pool(part.clone(), layout, "mean", skip, backend=backend)
    )


@pytest.mark.parametrize("backend", ["reference", "blocked"])
@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "unit"])
@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(mode, normalize, backend):
    layout = SequenceLayout.from_lengths([4, 1, 0, 6])
    hidden = torch.randn(layout.total, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    skip = torch.tensor([1, 0, 2, 3])
    assert torch.autograd.gradcheck(
        lambda x: pool(x, layout, mode, skip, normalize, backend), hidden.requires_grad_(), fast_mode=False
    )


@pytest.mark.parametrize("backend", ["reference", "blocked", "triton"])
@pytest.mark.parametrize("mode", MODES)
def test_values_by_hand(mode, backend):
    hidden = torch.tensor([[1.0], [-2.0], [4.0], [20.0], [10.0]])
    layout = SequenceLayout.from_lengths([3, 2])
    everything = {"mean": [1, 15], "weighted_mean": [1.5, 40 / 3], "last": [4, 10], "first": [1, 20]}
    everything |= {"mean_sqrt_len": [3 / 3**0.5, 30 / 2**0.5], "max": [4, 20]}
    without_one = {"mean": [1, 10], "weighted_mean": [2, 10], "last": [4, 10], "first": [-2, 10]}
    without_one |= {"mean_sqrt_len": [2 / 2**0.5, 10], "max": [4, 10]}
    for skip, expected in ((None, everything), (torch.tensor([1, 1]), without_one)):
        pooled = pool(hidden, layout, mode, skip, backend=backend)
        torch.testing.assert_close(pooled[:, 0], torch.tensor(expected[mode]).float())


@pytest.mark.parametrize("backend", ["reference", "blocked", "triton"])
@pytest.mark.parametrize("mode", MODES)
def test_padding_rows_are_never_read(mode, backend):
    """Left, right and no padding, with NaN in the padding, pool to what the packed rows pool to."""
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    padded = SequenceLayout.from_attention_mask(mask)
    hidden = torch.full((16, 5), torch.nan)
    rows = torch.randn(9, 5, generator=torch.Generator().manual_seed(4))
    hidden[padded.rows] = rows
    skip = torch.tensor([1, 0, 2, 0])
    pooled = pool(hidden.requires_grad_(), padded, mode, skip, backend=backend)
    assert torch.equal(pooled, pool(rows, SequenceLayout.from_lengths([2, 3, 4, 0]), mode, skip, backend=backend))
    assert bool(pooled.isfinite().all())
    with uninitialised_memory_is_nan():
        pooled.sum().backward()
    assert not hidden.grad[padded.sequence_ids < 0].any()


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("mode", MODES)
def test_nothing_left_gives_zeros_and_no_gradient(mode, backend):
    hidden, layout, _ = packed([3, 0, 2], 8, torch.float32)
    hidden.requires_grad_()
    pooled = pool(hidden, layout, mode, skip=torch.tensor([3, 0, 99]), normalize=True, backend=backend)
    assert torch.equal(pooled, torch.zeros(3, 8))
    pooled.sum().backward()
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))


def test_skipped_tokens_do_not_matter():
    hidden, layout, _ = packed([6, 6], 4, torch.float32)
    poisoned = hidden.clone()
    poisoned[[0, 1, 6]] = torch.nan
    skip = torch.tensor([2, 1])
    for mode in MODES:
        assert torch.equal(pool(hidden, layout, mode, skip), pool(poisoned, layout, mode, skip))


def test_aliases():
    hidden, layout, skip = packed([5, 2], 4, torch.float32)
    aliases = {"last_token": "last", "eos_token": "last", "bos_token": "first", "mean_sqrt_len_tokens": "mean_sqrt_len"}
    for alias, mode in aliases.items():
        assert torch.equal(pool(hidden, layout, alias, skip), pool(hidden, layout, mode, skip))
    assert set(POOLING_MODES.values()) == set(MODES)


def test_normalize_gives_unit_rows():
    hidden, layout, _ = packed([5, 2, 9], 16, torch.float32)
    torch.testing.assert_close(pool(hidden, layout, normalize=True).norm(dim=1), torch.ones(3))


@pytest.mark.parametrize("backend", FAST)
def test_the_same_bits_every_time(backend):
    hidden, layout, skip = packed(MANY[:80], 32, torch.float16)
    first, second = (pool(hidden, layout, "mean", skip, backend=backend) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("mode", ["mean", "max"])
@pytest.mark.parametrize("triton", [False, True], ids=FAST)
def test_opcheck(triton, mode):
    hidden, layout, skip = packed([5, 0, 9], 8, torch.float32)
    arguments = (layout.starts, layout.lengths, skip, mode)
    torch.library.opcheck(pool_operator, (hidden.requires_grad_(), *arguments, False, triton))
    _, places = pool_operator(hidden, *arguments, False, triton)
    torch.library.opcheck(
        pool_backward_operator, (torch.ones(3, 8), places, 14, *arguments, torch.float16, True, triton),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


@pytest.mark.parametrize("mode", ["weighted_mean", "max"])
@pytest.mark.parametrize("backend", FAST)
def test_it_compiles_whole_and_only_once_as_lengths_change(backend, mode):
    torch._dynamo.reset()
    counters.clear()

    @torch.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    def step(hidden, layout):
        return pool(hidden * 2, layout, mode, backend=backend).square().sum()

    for lengths in ((5, 9, 3), (4, 1, 30, 7), (0, 17), (3, 3, 3, 3, 50)):
        hidden, layout, _ = packed(lengths, 8, torch.float32)
        loss = step(hidden.requires_grad_(), layout)
        loss.backward()
        expected = pool(hidden * 2, layout, mode, backend="reference").square().sum()
        torch.testing.assert_close(loss, expected)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "median"}, "pooling mode 'median' is unknown"),
        ({"hidden": torch.zeros(3, 4)}, r"hidden has shape \(3, 4\): this layout needs \(7, d\)"),
        ({"hidden": torch.zeros(7)}, r"hidden has shape \(7,\)"),
        ({"skip": torch.zeros(3, dtype=torch.int64)}, r"skip has shape \(3,\)"),
        ({"skip": torch.zeros(2)}, "dtype torch.float32: pass integers"),
        ({"skip": torch.zeros(2, dtype=torch.bool)}, "dtype torch.bool: pass integers"),
        ({"hidden": torch.zeros(7, 4, dtype=torch.long)}, "hidden has dtype torch.int64: pass floating-point rows"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    arguments = {"hidden": torch.zeros(7, 4), "layout": SequenceLayout.from_lengths([4, 3]), "mode": "mean"}
    with pytest.raises(ValueError, match=message):
        pool(**{**arguments, **change})


def test_float64_on_triton_is_refused():
    with pytest.raises(BackendUnavailableError, match="pool has no 'triton' implementation"):
        pool(torch.zeros(7, 4).double(), SequenceLayout.from_lengths([4, 3]), backend="triton")


@pytest.mark.parametrize("mode", sorted(set(POOLING_MODES.values())))
def test_one_text_that_is_all_padding_gives_zeros(mode):
    layout = SequenceLayout.from_attention_mask(torch.zeros(1, 20, dtype=torch.long))
    with torch.inference_mode():
        assert torch.equal(pool(torch.randn(20, 4), layout, mode), torch.zeros(1, 4))


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize("lengths", [[5, 1, 0, 9, 2], [70, 40]], ids=["short", "long"])
def test_the_first_of_equal_maxima_takes_the_gradient(lengths, backend):
    """As `torch.max` has it: of numbers of both signs, of zeros of both signs, and of infinities."""
    layout = SequenceLayout.from_lengths(lengths)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randint(-2, 2, (layout.total, 7), generator=generator).float()
    hidden[:, 1], hidden[:, 2] = -0.0, torch.where(torch.rand(layout.total, generator=generator) < 0.5, 0.0, -0.0)
    hidden[:, 3], hidden[::3, 4] = -torch.inf, torch.inf
    upstream = torch.randn(len(lengths), 7, generator=generator)
    pooled = pool(hidden.requires_grad_(), layout, "max", backend=backend)
    (gradient,) = torch.autograd.grad(pooled, hidden, upstream)
    expected = torch.zeros_like(hidden)
    for start, length, row, grad in zip(layout.starts.tolist(), lengths, pooled, upstream, strict=True):
        if length:
            values, places = hidden[start : start + length].max(0)
            assert torch.equal(row, values)
            expected[start + places, torch.arange(7)] = grad
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize("lengths", [[3, 2], [40, 50]], ids=["short", "long"])
def test_what_is_not_a_number_shows_in_the_maximum(lengths, backend):
    layout = SequenceLayout.from_lengths(lengths)
    hidden = torch.full((layout.total, 3), torch.inf)
    hidden[1, 0], hidden[0, 1] = torch.nan, -torch.nan
    for graph in (False, True):
        pooled = pool(hidden.requires_grad_(graph), layout, "max", backend=backend)
        assert pooled.isnan().tolist() == [[True, True, False], [False] * 3]


@pytest.mark.parametrize("mode", MODES)
def test_a_negative_skip_leaves_nothing_out(mode):
    hidden, layout, _ = packed([3, 2], 4, torch.float32)
    for backend in ("reference", *FAST):
        assert torch.equal(
            pool(hidden, layout, mode, torch.tensor([-2, -1]), backend=backend),
            pool(hidden, layout, mode, backend=backend),
        )


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize("mode", MODES)
def test_no_sequences_still_have_a_gradient(mode, backend):
    for layout in (
        SequenceLayout.from_lengths([]),
        SequenceLayout.from_lengths([0, 0]),
        SequenceLayout.from_attention_mask(torch.zeros(2, 3, dtype=torch.long)),
    ):
        hidden = torch.randn(layout.total, 4, requires_grad=True)
        pooled = pool(hidden, layout, mode, normalize=True, backend=backend)
        assert torch.equal(pooled, torch.zeros(len(layout), 4))
        pooled.sum().backward()
        assert torch.equal(hidden.grad, torch.zeros_like(hidden))
