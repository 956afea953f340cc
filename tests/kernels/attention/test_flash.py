"""flash-attn as a backend: its arguments mean what we say they mean, and it runs where, and only where, it can.

The packages are stand-ins that compute what flash-attn documents: a wrong window, scale or alignment shows as a number.
"""

import sys
import threading

import flash_packages
import pytest
import torch
from attention_cases import LAYOUTS, Case, make_layout, three_ways
from numerics import GRADIENT_FACTOR, assert_error_within
from torch._dynamo.utils import counters

from llm2vec_fast.kernels.attention import attention, flash
from llm2vec_fast.kernels.dispatch import ENVIRONMENT_VARIABLE, BackendUnavailableError
from llm2vec_fast.kernels.layout import SequenceLayout

LENGTHS = (5, 0, 70, 1, 33)
RULES = [
    {},
    {"window": 0},
    {"window": 1},
    {"window": 20},
    {"causal": True},
    {"causal": True, "window": 20},
    {"softcap": 2.0, "scale": 0.5},
    {"scale": 0.7, "window": 3, "softcap": 30.0},
]
CASES = [
    *(Case(LENGTHS, 4, 2, settings=rule) for rule in RULES),
    *(Case(LENGTHS, 4, 1, layout=layout, settings={"window": 9}) for layout in LAYOUTS),
    *(Case((40, 9), head_dim=size) for size in (40, 64, 128, 256)),
    Case((1, 0, 1, 1), heads=4, kv_heads=2),
    Case((0, 0), layout="right"),
    Case(()),
]


class Packages:
    """Installs stand-ins as if CPU tensors were on a GPU."""

    def __init__(self, monkeypatch):
        self._monkeypatch = monkeypatch
        for package in flash.PACKAGES:
            monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
        self.capability(None)
        flash._package_problem.cache_clear()

    def capability(self, capability):
        def ask(_):
            with threading.RLock():  # torch.compile can no more trace this than it can the question to a GPU
                return capability

        self._monkeypatch.setattr(flash, "_capability", ask)

    def install(self, version, capability, function=None, recorded=True):
        package = {2: flash.FLASH_2, 3: flash.FLASH_3}[version]
        stand_in = {2: flash_packages.flash_attn_2, 3: flash_packages.flash_attn_3}[version]
        self.capability(capability)
        flash._package_problem.cache_clear()
        return flash_packages.install(self._monkeypatch, package, function or stand_in, recorded)


@pytest.fixture
def packages(monkeypatch):
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    yield Packages(monkeypatch)
    flash._package_problem.cache_clear()


@pytest.fixture(params=[2, 3], ids=["fa2", "fa3"])
def installed(request, packages):
    return packages.install(request.param, {2: (8, 0), 3: (9, 0)}[request.param])


def _gradients(q, k, v, layout, **settings):
    tensors = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attention(*tensors, layout, **settings)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(7))
    return torch.autograd.grad(out, tensors, upstream.to(out.dtype))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_flash_attn_is_told_what_we_mean(installed, case, dtype):
    def with_lse(*tensors, **settings):
        return attention(*tensors, return_lse=True, **settings)

    for name, *results in zip(("out", "lse"), *three_ways(case, dtype, "flash", call=with_lse), strict=True):
        assert_error_within(*results, name=name)
    if case.head_dim <= flash.MAX_DETERMINISTIC_HEAD_DIM_3:
        results = three_ways(case, dtype, "flash", call=_gradients)
        for name, *each in zip(("dq", "dk", "dv"), *results, strict=True):
            assert_error_within(*each, factor=GRADIENT_FACTOR, name=name)
    assert all(call.arguments["deterministic"] is True for call in installed)
    assert bool(installed) == (sum(case.lengths) > 0)


def test_padding_is_never_read_and_comes_out_as_zeros(installed):
    case = Case((40, 7, 0), layout="left")
    layout = case.sequence_layout()
    tensors = case.inputs(torch.float16)
    clean = attention(*tensors, layout, backend="flash")
    padding = layout.sequence_ids < 0
    for x in tensors:
        x[padding] = float("nan")
    out, lse = attention(*tensors, layout, backend="flash", return_lse=True)
    assert torch.equal(out, clean)
    assert not out[padding].any()
    assert bool((lse[padding] == float("-inf")).all())


def _ran(calls, tensors, layout, backend="auto", **settings):
    """Whether flash-attn was called."""
    before = len(calls)
    attention(*tensors, layout, backend=backend, **settings)
    return len(calls) > before


@pytest.mark.parametrize(
    ("version", "capability", "chosen"),
    [
        (2, (8, 0), True),
        (2, (8, 6), True),
        (2, (8, 9), True),
        (2, (9, 0), False),
        (2, (12, 0), False),
        (3, (9, 0), True),
        (3, (8, 0), False),
        (3, (10, 0), False),
        (2, (7, 5), False),
        (2, None, False),
    ],
)
def test_auto_takes_it_on_the_gpus_it_was_made_for(packages, version, capability, chosen):
    calls = packages.install(version, capability)
    case = Case(LENGTHS)
    assert _ran(calls, case.inputs(torch.bfloat16), case.sequence_layout()) == chosen


@pytest.mark.parametrize(
    ("change", "chosen"),
    [
        ({}, True),
        ({"dtype": torch.float32}, False),
        ({"dtype": torch.float64}, False),
        ({"layout": "right"}, False),
        ({"dropout_p": 0.3}, False),
        ({"dropout_p": 0.3, "seed": 3}, False),
        ({"head_dim": 264}, False),
        ({"softcap": 3.0, "window": 4}, True),
    ],
    ids=str,
)
def test_auto_leaves_alone_what_would_differ_or_be_copied(installed, change, chosen):
    settings = dict(change)
    dtype, kind = settings.pop("dtype", torch.float16), settings.pop("layout", "packed")
    case = Case((5, 9), head_dim=settings.pop("head_dim", 16), layout=kind)
    assert _ran(installed, case.inputs(dtype), case.sequence_layout(), **settings) == chosen


def test_version_3_goes_first_and_version_2_fills_in(packages):
    second = packages.install(2, (9, 0))
    third = packages.install(3, (9, 0))
    case = Case((5, 9), head_dim=16)
    layout, tensors = case.sequence_layout(), case.inputs(torch.float16)
    assert _ran(third, tensors, layout, "flash")
    assert not _ran(third, tensors, layout, "flash", dropout_p=0.5)
    wide = [x.detach().requires_grad_() for x in Case((5, 9), head_dim=256).inputs(torch.float16)]
    assert not _ran(third, wide, layout, "flash")
    assert len(second) == 2


@pytest.mark.parametrize(
    ("version", "capability", "head_dim", "settings", "why"),
    [
        (2, None, 16, {}, "flash-attn runs on NVIDIA GPUs, not on cpu tensors"),
        (2, (7, 5), 16, {}, "FlashAttention-2 needs sm_80 or newer and this GPU is sm_75"),
        (3, (8, 0), 16, {}, "FlashAttention-3 needs sm_90 and this GPU is sm_80; flash_attn is not installed"),
        (3, (9, 0), 20, {}, "multiple of 8, not 20"),
        (2, (9, 0), 264, {}, "head_dim of 256 at most, not 264"),
        (2, (9, 0), 16, {"dropout_p": 0.5, "seed": 1}, "follows no seed"),
        (3, (9, 0), 16, {"dropout_p": 0.5}, "FlashAttention-3 has no dropout"),
        (2, (9, 0), 16, {"dropout_p": 0.5, "softcap": 1.0}, "no dropout together with softcap"),
    ],
)
def test_asked_for_where_it_cannot_run_it_says_why(packages, version, capability, head_dim, settings, why):
    packages.install(version, capability)
    case = Case((5, 9), head_dim=head_dim)
    with pytest.raises(BackendUnavailableError, match=why):
        attention(*case.inputs(torch.float16), case.sequence_layout(), backend="flash", **settings)


def test_a_gradient_it_cannot_give_is_refused_before_it_is_needed(packages):
    packages.install(3, (9, 0))
    case = Case((5, 9), head_dim=256)
    tensors = [x.detach().requires_grad_() for x in case.inputs(torch.float16)]
    with pytest.raises(BackendUnavailableError, match="not deterministic"):
        attention(*tensors, case.sequence_layout(), backend="flash")
    with torch.no_grad():
        attention(*tensors, case.sequence_layout(), backend="flash")


@pytest.mark.parametrize("graph", [True, False])
def test_dropout_whose_gradient_it_cannot_give_is_refused_without_a_graph_too(packages, graph):
    """What is computed again for its gradient must drop the same, so that both passes need one backend."""
    packages.install(2, (8, 6))
    case = Case((5, 9), head_dim=256)
    tensors = [x.detach().requires_grad_() for x in case.inputs(torch.float16)]
    with torch.set_grad_enabled(graph), pytest.raises(BackendUnavailableError, match="needs sm_80 or sm_90"):
        attention(*tensors, case.sequence_layout(), backend="flash", dropout_p=0.1)


def test_float32_and_too_many_sequences_are_refused(packages):
    packages.install(2, (8, 0))
    case = Case((5, 9))
    with pytest.raises(BackendUnavailableError, match="takes float16 and bfloat16, not float32"):
        attention(*case.inputs(torch.float32), case.sequence_layout(), backend="flash")
    layout = SequenceLayout.from_lengths([0] * flash.MAX_SEQUENCES_2 + [3])
    q, k, v = (torch.zeros(3, 1, 8, dtype=torch.float16) for _ in range(3))
    with pytest.raises(BackendUnavailableError, match="takes 65,535 sequences at most, not 65,536"):
        attention(q, k, v, layout, backend="flash")


def test_a_package_that_is_missing_broken_or_old_is_not_used(packages, monkeypatch):
    case = Case((5, 9))
    call = case.inputs(torch.float16), case.sequence_layout()
    packages.capability((8, 0))
    with pytest.raises(BackendUnavailableError, match="flash_attn is not installed"):
        attention(*call[0], call[1], backend="flash")

    def without_softcap(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal,
                        window_size):  # fmt: skip
        raise AssertionError("called")

    packages.install(2, (8, 0), without_softcap)
    with pytest.raises(BackendUnavailableError, match=r"flash_attn is too old: .* takes no softcap, "):
        attention(*call[0], call[1], backend="flash")

    def broken(name):
        raise ImportError("undefined symbol: _ZN3c10")

    flash._package_problem.cache_clear()
    monkeypatch.setattr(flash, "import_module", broken)
    with pytest.raises(BackendUnavailableError, match="cannot be imported \\(undefined symbol"):
        attention(*call[0], call[1], backend="flash")
    attention(*call[0], call[1])


def test_an_early_version_3_runs_but_where_the_log_sum_exp_is_asked_for(packages):
    calls = packages.install(3, (9, 0), flash_packages.early_flash_attn_3)
    case = Case((5, 9))
    call = case.inputs(torch.float16), case.sequence_layout()
    assert _ran(calls, *call)
    assert not _ran(calls, *call, return_lse=True)
    with pytest.raises(BackendUnavailableError, match="does not return the log-sum-exp"):
        attention(*call[0], call[1], backend="flash", return_lse=True)


def test_the_environment_asks_for_it_too(packages, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "flash")
    case = Case((5, 9))
    layout = case.sequence_layout()
    with pytest.raises(BackendUnavailableError, match="NVIDIA GPUs, not on cpu"):
        attention(*case.inputs(torch.float16), layout)
    calls = packages.install(2, (9, 0))
    assert _ran(calls, case.inputs(torch.float16), layout)
    assert not _ran(calls, case.inputs(torch.float32), layout)


@torch.library.custom_op("llm2vec_fast_tests::flash", mutates_args=())
def _flash_operator(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, longest: int, scale: float, window: int
) -> torch.Tensor:
    return flash_packages.flash_attn_2(
        q, k, v, cu_seqlens, cu_seqlens, longest, longest, softmax_scale=scale, window_size=(window, window)
    )


@_flash_operator.register_fake
def _(q, k, v, cu_seqlens, longest, scale, window):
    return torch.empty_like(q)


def _opaque(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
):  # fmt: skip
    """As the packages are to torch.compile: an operator it does not look into."""
    return _flash_operator(q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale, window_size[0])


def _compiled(function):
    torch._dynamo.reset()
    counters.clear()
    return torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)


def test_it_compiles_whole_and_only_once_as_lengths_change(packages):
    packages.install(2, (8, 0), _opaque, recorded=False)

    def step(q, k, v, layout):
        return attention(q * 2, k, v, layout, backend="flash", window=9)

    compiled = _compiled(step)
    for lengths in ((5, 9, 3), (4, 1, 30, 7), (2, 17, 6), (3, 3, 3, 3, 50)):
        tensors = Case(lengths, heads=2, kv_heads=1, head_dim=16).inputs(torch.float16)
        layout = make_layout("packed", lengths)
        torch.testing.assert_close(compiled(*tensors, layout), step(*tensors, layout))
    assert counters["stats"]["unique_graphs"] == 1


def test_inside_torch_compile_a_padded_batch_is_not_its_own(packages):
    packages.install(2, (8, 0), _opaque, recorded=False)
    case = Case((5, 9), head_dim=16, layout="right")
    call = *case.inputs(torch.float16), case.sequence_layout()

    def taken(q, k, v, layout):
        offer = flash.offer(q, k, v, layout, softcap=None, dropout_p=0.0, seed=None, return_lse=False)
        return q.new_zeros(1) + (offer.package is not None)

    assert bool(taken(*call))
    assert not bool(_compiled(taken)(*call))


@pytest.mark.parametrize("operator", [True, False], ids=["operator", "no-operator"])
def test_inside_torch_compile_auto_takes_it_only_where_it_is_an_operator(packages, monkeypatch, operator):
    packages.install(2, (8, 0), _opaque, recorded=False)
    if operator:
        monkeypatch.setattr(sys.modules[__name__], "_flash_attn_varlen_forward", _flash_operator, raising=False)

    def taken(q, k, v, layout):
        offer = flash.offer(q, k, v, layout, softcap=None, dropout_p=0.0, seed=None, return_lse=False)
        return q.new_zeros(1) + (offer.preferred is not None)

    case = Case((5, 9), head_dim=16)
    call = *case.inputs(torch.float16), case.sequence_layout()
    assert bool(taken(*call))
    assert bool(_compiled(taken)(*call)) == operator
