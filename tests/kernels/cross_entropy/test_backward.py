"""Gradients are as exact as plain PyTorch's for every subset of inputs that wants one, and cost no more than needed."""

import functools
import itertools

import pytest
import torch
from cross_entropy_cases import IGNORED, Case, gradients, three_ways
from numerics import GRADIENT_FACTOR, assert_error_within
from pairwise import pairwise
from torch.utils.flop_counter import FlopCounterMode

from llm2vec_fast.kernels.cross_entropy import (
    blocked,
    configurations,
    linear_cross_entropy,
    operator,
    triton_backward,
)

RULES = [
    {},
    {"softcap": 5.0},
    {"label_smoothing": 0.1},
    {"z_loss": 1e-2},
    {"softcap": 5.0, "label_smoothing": 0.1, "z_loss": 1e-2},
]
CASES = [
    *(
        Case(70, 333, 40, bias=True, settings={**rule, "reduction": reduction})
        for rule in RULES
        for reduction in ("mean", "none")
    ),
    Case(70, 333, 40, settings={"reduction": "sum"}),
    *(Case(20, vocabulary, 16) for vocabulary in (1, 2, 127, 128, 129, 1000)),
    *(Case(20, 200, width) for width in (1, 7, 65, 200)),
    *(Case(rows, 200, 16) for rows in (1, 129)),
    *(Case(50, 200, 16, labelled=share, bias=True) for share in (0.0, 1.0)),
    Case(0, 20, 16),
]
BACKENDS = [
    pytest.param(backend, dtype, id=f"{backend}-{str(dtype).removeprefix('torch.')}")
    for backend, dtypes in {
        "triton": (torch.float32, torch.float16),
        "blocked": (torch.float32, torch.bfloat16, torch.float16),
    }.items()
    for dtype in dtypes
]
NAMES = ("hidden", "weight", "bias")
SUBSETS = [x for n in range(4) for x in itertools.combinations(NAMES, n)]


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks of rows and of the vocabulary, and several slices of each, on small inputs."""
    monkeypatch.setattr(blocked, "BLOCK_BYTES", 8 * 1024)
    monkeypatch.setattr(blocked, "SLICE_ELEMENTS", 700)
    monkeypatch.setattr(triton_backward, "BLOCK_BYTES", 16 * 1024)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_gradients_are_as_exact_as_pytorch(case, backend, dtype):
    for name, results in three_ways(case, dtype, backend, gradients).items():
        assert_error_within(*results, factor=GRADIENT_FACTOR, name=name)


MORE_ROWS_THAN_COLUMNS = [Case(90, 333, 40, labelled=1.0, bias=True, settings=rule) for rule in RULES]


@pytest.mark.parametrize("case", [*CASES[:11:2], CASES[1], CASES[9], *MORE_ROWS_THAN_COLUMNS], ids=str)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_gradients_over_many_blocks(small_blocks, case, backend, dtype):
    for name, results in three_ways(case, dtype, backend, gradients).items():
        assert_error_within(*results, factor=GRADIENT_FACTOR, name=name)


def test_gradients_over_many_blocks_in_memory_that_the_forward_pass_leaves(monkeypatch):
    monkeypatch.setattr(blocked, "BLOCK_BYTES", 128 * 1024)
    case = Case(90, 1000, 40, labelled=1.0, bias=True)
    for name, results in three_ways(case, torch.bfloat16, "blocked", gradients).items():
        assert_error_within(*results, factor=GRADIENT_FACTOR, name=name)


def test_gradients_over_the_largest_vocabulary():
    case = Case(6, 262144, 8, labelled=1.0)
    for name, results in three_ways(case, torch.bfloat16, "blocked", gradients).items():
        assert_error_within(*results, factor=GRADIENT_FACTOR, name=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gradients_with_tiles_copied_by_descriptors(monkeypatch, dtype):
    monkeypatch.setattr(configurations, "gradient", lambda *_: configurations.Configuration(32, 64, 16, 4, 2, True))
    monkeypatch.setattr(configurations, "product", lambda *_: configurations.Configuration(16, 32, 16, 4, 2, True))
    case = Case(70, 333, 40, bias=True, settings={"label_smoothing": 0.1})
    for name, results in three_ways(case, dtype, "triton", gradients).items():
        assert_error_within(*results, factor=GRADIENT_FACTOR, name=name)


@pytest.mark.parametrize("rule", RULES[:2], ids=str)
def test_gradients_by_tiles_that_are_worked_on_in_halves(monkeypatch, rule):
    config = configurations.Configuration(16, 256, 16, 4, 2)
    for name in ("gradient", "product"):
        monkeypatch.setattr(configurations, name, lambda *_: config)
    case = Case(20, 700, 150, bias=True, settings=rule)
    for name, results in three_ways(case, torch.float32, "triton", gradients).items():
        assert_error_within(*results, factor=GRADIENT_FACTOR, name=name)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_gradcheck_in_float64(small_blocks, backend, reduction, rule):
    case = Case(12, 21, 5, labelled=0.6, bias=True)
    tensors = [x.requires_grad_() for x in case.tensors(torch.float64)]

    def loss(hidden, weight, bias):
        return linear_cross_entropy(
            hidden, weight, case.labels(), bias=bias, reduction=reduction, backend=backend, **rule
        )

    # A second backward pass through one graph computes anew what the first took over: equal but for the last bits.
    assert torch.autograd.gradcheck(loss, tensors, fast_mode=True, nondet_tol=1e-12)


@pytest.mark.parametrize(
    ("wanted", "backend", "dtype", "reduction"),
    [
        pytest.param(case["wanted"], *case["backend"].values, case["reduction"], id="-".join(map(str, (
            case["backend"].id, "+".join(case["wanted"]) or "none", case["reduction"]
        ))))
        for case in pairwise(wanted=SUBSETS, backend=BACKENDS, reduction=["mean", "none"])
    ],
)  # fmt: skip
def test_every_subset_of_requires_grad(small_blocks, backend, dtype, wanted, reduction):
    case = Case(20, 333, 16, labelled=1.0, bias=True)
    tensors = dict(zip(NAMES, case.tensors(dtype), strict=True))

    def run(chosen):
        leaves = {name: x.detach().requires_grad_(name in chosen) for name, x in tensors.items()}
        loss = linear_cross_entropy(
            leaves["hidden"], leaves["weight"], case.labels(), bias=leaves["bias"], reduction=reduction, backend=backend
        )
        assert loss.requires_grad == bool(chosen)
        if chosen:
            loss.sum().backward()
        return {name: x.grad for name, x in leaves.items()}

    every = run(NAMES)
    for name, grad in run(wanted).items():
        assert (grad is None) == (name not in wanted)
        # Made in another order of blocks they may differ in the last bits.
        assert grad is None or torch.allclose(grad, every[name], rtol=8 * torch.finfo(dtype).eps, atol=1e-3)


@pytest.fixture
def products(monkeypatch):
    """A function that takes a training step and returns its products over the labelled rows, in units of one."""
    counted = []

    def counting(function):
        def call(*arguments):
            with FlopCounterMode(display=False) as counter:
                out = function(*arguments)
            counted.append(counter.get_total_flops())
            return out

        return call

    for name in ("forward_blocked", "gradients_blocked"):
        monkeypatch.setattr(operator, name, counting(getattr(operator, name)))

    def step(case, dtype, wanted, reduction="mean"):
        hidden, weight, _ = case.tensors(dtype)
        hidden.requires_grad_("hidden" in wanted)
        weight.requires_grad_("weight" in wanted)
        loss = linear_cross_entropy(hidden, weight, case.labels(), reduction=reduction, backend="blocked")
        if wanted:
            loss.sum().backward()
        labelled = int((case.labels() != IGNORED).sum())
        return sum(counted) / (2 * labelled * case.vocabulary * case.width)

    return step


@pytest.mark.parametrize(
    ("dtype", "wanted", "reduction", "expected"),
    [
        (torch.float32, (), "mean", 1),
        (torch.float32, ("hidden",), "mean", 2),
        (torch.bfloat16, ("hidden",), "mean", 2),
        (torch.bfloat16, ("hidden",), "none", 2),
        (torch.float32, ("weight",), "mean", 2),
        (torch.float32, ("hidden", "weight"), "mean", 3),
        (torch.float32, ("hidden", "weight"), "none", 4),
        (torch.bfloat16, ("hidden", "weight"), "none", 4),
    ],
)
def test_no_product_is_computed_that_nobody_needs(small_blocks, products, dtype, wanted, reduction, expected):
    assert products(Case(100, 300, 16), dtype, wanted, reduction) == expected


@pytest.mark.parametrize(("width", "expected"), [(20, 3 + 80 / 100), (100, 3), (120, 3)])
def test_the_gradient_of_a_16_bit_weight_holds_the_logits_of_as_many_rows_as_it_has_columns(
    small_blocks, products, width, expected
):
    assert products(Case(100, 300, width, labelled=1.0), torch.bfloat16, ("hidden", "weight")) == expected


def test_a_16_bit_weight_whose_logits_fit_in_one_block_needs_no_second_pass(products):
    assert products(Case(100, 300, 16), torch.bfloat16, ("hidden", "weight")) == 3


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("backend", ["reference", "blocked", "triton"])
def test_a_batch_without_labels_gives_zeros(backend, reduction):
    case = Case(9, 30, 8, labelled=0.0, bias=True)
    tensors = [x.requires_grad_() for x in case.tensors(torch.float32)]
    hidden, weight, bias = tensors
    out = linear_cross_entropy(
        hidden, weight, case.labels(), bias=bias, reduction=reduction, return_accuracy=True, backend=backend
    )
    assert not out.loss.any()
    assert out.accuracy == 0
    assert all(not x.any() for x in torch.autograd.grad(out.loss.sum(), tensors))


@pytest.mark.parametrize(
    ("backend", "dtype", "reduction", "labelled"),
    [
        ("blocked", torch.float32, "mean", 1.0),
        ("blocked", torch.float32, "none", 0.3),  # with more rows, logits that are made twice differ by more than this
        ("blocked", torch.bfloat16, "mean", 1.0),
        ("blocked", torch.bfloat16, "none", 1.0),
        ("triton", torch.float32, "mean", 1.0),
        ("triton", torch.float32, "none", 1.0),
    ],
)
def test_a_second_backward_pass_gives_the_same_gradients(small_blocks, backend, dtype, reduction, labelled):
    case = Case(70, 333, 40, labelled=labelled, bias=True)
    tensors = [x.requires_grad_() for x in case.tensors(dtype)]
    hidden, weight, bias = tensors
    loss = linear_cross_entropy(hidden, weight, case.labels(), bias=bias, reduction=reduction, backend=backend).sum()
    first = torch.autograd.grad(loss * 3, tensors, retain_graph=True)
    kept = [x.clone() for x in first]
    second = torch.autograd.grad(loss, tensors)
    assert all(torch.equal(x, y) for x, y in zip(first, kept, strict=True)), "the first gradients were overwritten"
    for x, y in zip(first, second, strict=True):  # from slopes rounded to the dtype with another factor
        atol = max(1e-5, torch.finfo(dtype).eps * float(x.abs().max()))
        torch.testing.assert_close(x, 3 * y, rtol=1.3e-6 if dtype == torch.float32 else 1.6e-2, atol=atol)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_a_second_backward_pass_is_as_exact_as_pytorch(small_blocks, backend, dtype, reduction):
    case = Case(70, 333, 40, labelled=1.0, bias=True, settings={"reduction": reduction})
    twice = functools.partial(gradients, passes=2)
    for name, results in three_ways(case, dtype, backend, twice).items():
        assert_error_within(*results, factor=GRADIENT_FACTOR, name=name)


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_two_runs_give_the_same_bits(small_blocks, backend, dtype):
    case = Case(70, 333, 40, bias=True)
    first, second = (gradients(*case.tensors(dtype), case.labels(), backend=backend) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("backend", ["blocked", "triton"])
def test_negative_and_zero_upstream_gradients(small_blocks, backend):
    case = Case(40, 100, 16, bias=True, settings={"reduction": "none", "z_loss": 0.01, "label_smoothing": 0.1})
    hidden, weight, bias = case.tensors(torch.float64)
    upstream = torch.linspace(-2, 2, 41, dtype=torch.float64)[:40]
    results = []
    for name, dtype in ((backend, torch.float32), ("reference", torch.float32), ("reference", torch.float64)):
        tensors = [x.to(dtype).requires_grad_() for x in (hidden, weight, bias)]
        loss = linear_cross_entropy(*tensors[:2], case.labels(), bias=tensors[2], backend=name, **case.settings)
        results.append(torch.autograd.grad(loss, tensors, upstream.to(dtype)))
    for name, *three in zip(NAMES, *results, strict=True):
        assert_error_within(*three, factor=GRADIENT_FACTOR, name=name)


def test_a_sum_that_float16_cannot_hold_is_divided_in_time(small_blocks):
    """transformers divides the summed loss by the number of tokens, afterwards."""
    case = Case(400, 20, 8, labelled=1.0, settings={"reduction": "sum"})
    gradients = []
    for dtype, backend in ((torch.float64, "reference"), (torch.float16, "blocked")):
        hidden, weight, _ = case.tensors(torch.float64)
        hidden, weight = (1e4 * hidden).to(dtype), (1e-4 * weight).to(dtype).requires_grad_()
        loss = linear_cross_entropy(hidden, weight, case.labels(), backend=backend, **case.settings) / case.rows
        gradients.append(torch.autograd.grad(loss, weight)[0].double())
    exact, ours = gradients
    assert exact.abs().max() * case.rows > torch.finfo(torch.float16).max
    torch.testing.assert_close(ours, exact, rtol=0.02, atol=0.01 * float(exact.abs().max()))


def test_small_upstream_gradients_are_not_lost_in_float16():
    case = Case(40, 100, 16, settings={"reduction": "sum"})
    grads = {}
    for scale in (1.0, 2.0**-12):
        hidden, weight, _ = (x if x is None else x.requires_grad_() for x in case.tensors(torch.float16))
        loss = linear_cross_entropy(hidden, weight, case.labels(), backend="triton", **case.settings)
        grads[scale] = torch.autograd.grad(loss * scale, weight)[0].double() / scale
    size = grads[1.0].abs().max()
    # What is left is the rounding of the result itself: half of float16's smallest step, scaled back up.
    assert (grads[1.0] - grads[2.0**-12]).abs().max() <= size * torch.finfo(torch.float16).eps + 2.0**-25 * 2**12


def test_weight_gradients_of_many_microbatches_add_up_under_autocast():
    case = Case(64, 200, 32, labelled=1.0)
    hidden, weight, _ = case.tensors(torch.float32)
    labels = case.labels()

    def gradient(parts, dtype, backend):
        w = weight.to(dtype).requires_grad_()
        for rows in torch.arange(64).chunk(parts):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.float32):
                loss = linear_cross_entropy(hidden[rows].to(dtype), w, labels[rows], reduction="sum", backend=backend)
            loss.backward()
        return w.grad

    exact = gradient(1, torch.float64, "reference")
    for parts in (1, 16):
        ours = gradient(parts, torch.float32, "blocked")
        assert ours.dtype == torch.float32
        plain = gradient(parts, torch.float32, "reference")
        assert_error_within(ours, plain, exact, factor=GRADIENT_FACTOR, name=f"{parts} microbatches")
