"""The loss is as exact as plain PyTorch in the same dtype, whatever the vocabulary, width, labels and rule."""

import pytest
import torch
import torch.nn.functional as F
from cross_entropy_cases import IGNORED, Case, everything, three_ways
from numerics import assert_error_within

from llm2vec_fast.kernels.cross_entropy import blocked, linear_cross_entropy

RULES = [
    {"softcap": 5.0},
    {"label_smoothing": 0.1},
    {"z_loss": 1e-2},
    {"softcap": 5.0, "label_smoothing": 0.1, "z_loss": 1e-2},
]
CASES = [
    *(Case(37, 300, 24, settings={"reduction": reduction}) for reduction in ("mean", "sum", "none")),
    *(Case(70, 333, 40, bias=bias, settings={**rule, "reduction": "none"}) for rule in RULES for bias in (False, True)),
    *(Case(20, vocabulary, 16) for vocabulary in (1, 2, 127, 128, 129, 1000)),
    *(Case(20, 200, width) for width in (1, 7, 33, 65, 200)),
    *(Case(rows, 200, 16, settings={"reduction": "none"}) for rows in (1, 2, 64, 129)),
    *(Case(50, 200, 16, labelled=share) for share in (0.0, 1.0)),
    Case(30, 200, 16, settings={"ignore_index": 7}),
    Case(0, 20, 16),
]
BACKENDS = [
    pytest.param(backend, dtype, id=f"{backend}-{str(dtype).removeprefix('torch.')}")
    for backend, dtypes in {
        "triton": (torch.float32, torch.float16),  # Triton's interpreter gets bfloat16 products wrong
        "blocked": (torch.float32, torch.bfloat16),
    }.items()
    for dtype in dtypes
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_loss_and_log_probs_are_as_exact_as_pytorch(case, backend, dtype):
    for name, results in three_ways(case, dtype, backend, everything).items():
        assert_error_within(*results, name=name)


@pytest.mark.parametrize("vocabulary", [32003, 262144])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_vocabularies(vocabulary, dtype):
    case = Case(70, vocabulary, 8, labelled=1.0, settings={"reduction": "none"})
    assert_error_within(*three_ways(case, dtype, "blocked", everything)["loss"])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_definition_is_pytorch_s_cross_entropy(reduction, smoothing):
    case = Case(40, 50, 8, bias=True)
    hidden, weight, bias = case.tensors(torch.float64)
    settings = {"reduction": reduction, "label_smoothing": smoothing}
    ours = linear_cross_entropy(hidden, weight, case.labels(), bias=bias, backend="reference", **settings)
    torch.testing.assert_close(ours, F.cross_entropy(F.linear(hidden, weight, bias), case.labels(), **settings))


def test_softcap_and_z_loss_are_what_the_docstring_says():
    case = Case(40, 50, 8)
    hidden, weight, _ = case.tensors(torch.float64)
    logits = 2.0 * torch.tanh(hidden @ weight.T / 2.0)
    kept = case.labels() != IGNORED
    expected = F.cross_entropy(logits, case.labels(), reduction="sum") + 0.1 * logits.logsumexp(1)[kept].square().sum()
    ours = linear_cross_entropy(
        hidden, weight, case.labels(), softcap=2.0, z_loss=0.1, reduction="sum", backend="reference"
    )
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("backend", ["reference", "blocked", "triton"])
def test_accuracy_is_the_share_of_labelled_rows_whose_label_is_likeliest(backend):
    case = Case(60, 300, 16)
    hidden, weight, _ = case.tensors(torch.float32)
    labels = case.labels()
    out = linear_cross_entropy(hidden, weight, labels, return_accuracy=True, backend=backend)
    kept = labels != IGNORED
    expected = ((hidden @ weight.T).argmax(1) == labels)[kept].float().mean()
    assert 0 < expected < 1
    torch.testing.assert_close(out.accuracy, expected)
    assert out.log_probs is None


@pytest.mark.parametrize("backend", ["reference", "blocked", "triton"])
def test_log_probs_alone(backend):
    case = Case(60, 300, 16)
    hidden, weight, _ = case.tensors(torch.float32)
    out = linear_cross_entropy(
        hidden, weight, case.labels(), label_smoothing=0.3, return_log_probs=True, backend=backend
    )
    expected = -F.cross_entropy(hidden @ weight.T, case.labels(), reduction="none")
    torch.testing.assert_close(out.log_probs, expected)
    assert out.accuracy is None


@pytest.mark.parametrize("softcap", [None, 20000.0])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_logits_of_ten_thousand(backend, dtype, softcap):
    case = Case(40, 200, 16, labelled=1.0, settings={"softcap": softcap, "reduction": "none"})
    hidden, weight, _ = case.tensors(dtype)
    hidden[:, 0], weight[:, 0] = 100, torch.where(weight[:, 0] > 0, 100, -100)
    labels = case.labels()

    def loss(hidden, weight, backend):
        return linear_cross_entropy(hidden, weight, labels, backend=backend, **case.settings)

    exact = loss(hidden.double(), weight.double(), "reference")
    assert_error_within(loss(hidden, weight, backend), loss(hidden, weight, "reference"), exact)


@pytest.mark.parametrize("backend", ["reference", "blocked", "triton"])
def test_a_vocabulary_of_which_most_is_ruled_out_by_its_bias(backend):
    case = Case(20, 300, 16, labelled=1.0, bias=True)
    hidden, weight, bias = case.tensors(torch.float32)
    bias[5:] = float("-inf")  # whole tiles hold nothing but −inf
    labels = case.labels() % 5
    loss = linear_cross_entropy(hidden, weight, labels, bias=bias, backend=backend)
    torch.testing.assert_close(loss, F.cross_entropy(F.linear(hidden, weight, bias)[:, :5], labels))


@pytest.mark.parametrize("backend", ["reference", "blocked", "triton"])
def test_ignored_rows_are_never_read(backend):
    case = Case(60, 300, 16)
    hidden, weight, _ = case.tensors(torch.float32)
    clean = linear_cross_entropy(hidden, weight, case.labels(), backend=backend)
    hidden[case.labels() == IGNORED] = float("nan")
    assert torch.equal(linear_cross_entropy(hidden, weight, case.labels(), backend=backend), clean)


@pytest.mark.parametrize("backend", ["reference", "blocked", "triton"])
def test_rows_and_entries_with_strides_are_read_in_place(backend):
    case = Case(60, 300, 16, labelled=1.0)
    hidden, weight, _ = case.tensors(torch.float32)
    wide = [torch.full((x.shape[0], 24), float("nan")) for x in (hidden, weight)]
    views = [x[:, 3:19].copy_(y) for x, y in zip(wide, (hidden, weight), strict=True)]
    ours = linear_cross_entropy(*views, case.labels(), backend=backend)
    torch.testing.assert_close(ours, linear_cross_entropy(hidden, weight, case.labels(), backend=backend))


@pytest.mark.parametrize("kib", [1, 8])
def test_losses_do_not_depend_on_the_size_of_blocks(monkeypatch, kib):
    case = Case(70, 333, 24, settings={"reduction": "none"})
    hidden, weight, _ = case.tensors(torch.float32)
    whole = linear_cross_entropy(hidden, weight, case.labels(), reduction="none")
    monkeypatch.setattr(blocked, "BLOCK_BYTES", kib * 1024)
    monkeypatch.setattr(blocked, "SLICE_ELEMENTS", 700)
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, case.labels(), reduction="none"), whole)


@pytest.mark.parametrize("backend", ["reference", "blocked", "triton"])
def test_a_row_is_correct_whose_label_is_likeliest(backend):
    case = Case(60, 300, 16)
    hidden, weight, _ = case.tensors(torch.float32)
    labels = case.labels()
    out = linear_cross_entropy(hidden, weight, labels, return_accuracy=True, backend=backend)
    expected = ((hidden @ weight.T).argmax(1) == labels) & (labels != IGNORED)
    assert 0 < expected.sum() < 60
    assert torch.equal(out.correct, expected)
    without = linear_cross_entropy(hidden, weight, labels, return_log_probs=True, backend=backend)
    assert without.correct is None
