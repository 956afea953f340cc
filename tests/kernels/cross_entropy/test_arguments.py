"""What the loss cannot compute is refused in one sentence that names the value and the way out."""

import pytest
import torch

from llm2vec_fast.kernels.cross_entropy import linear_cross_entropy
from llm2vec_fast.kernels.dispatch import BackendUnavailableError


def arguments(**changes):
    made = {"hidden": torch.zeros(6, 8), "weight": torch.zeros(20, 8), "labels": torch.zeros(6, dtype=torch.int64)}
    return made | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": torch.zeros(2, 3, 8)}, r"shape \(6,\): pass one int64 a row of hidden, \(2, 3\)"),
        ({"hidden": torch.zeros(1, 2, 3, 8)}, r"shapes \(1, 2, 3, 8\) and \(20, 8\)"),
        ({"weight": torch.zeros(20, 9)}, r"shapes \(6, 8\) and \(20, 9\)"),
        ({"weight": torch.zeros(0, 8)}, "not empty"),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, r"labels are torch.int64 of shape \(5,\)"),
        ({"labels": torch.zeros(6)}, "labels are torch.float32"),
        ({"bias": torch.zeros(6)}, r"bias has shape \(6,\): pass one a row of weight, \(20,\)"),
        (
            {"weight": torch.zeros(20, 8, dtype=torch.float64)},
            "are torch.float32, torch.float64: pass one floating-point dtype",
        ),
        ({"bias": torch.zeros(20, dtype=torch.float16)}, "are torch.float32, torch.float32, torch.float16"),
        ({"hidden": torch.zeros(6, 8, device="meta")}, "on meta, cpu, cpu: move them"),
        ({"softcap": 0.0}, "softcap=0.0 is not a positive number"),
        ({"softcap": float("nan")}, "softcap=nan"),
        ({"label_smoothing": 1.5}, "label_smoothing=1.5 is not between 0 and 1"),
        ({"z_loss": -1.0}, "z_loss=-1.0"),
        ({"reduction": "average"}, "reduction='average' is unknown: choose one of mean, sum, none"),
        ({"backend": "fast"}, "backend='fast' is unknown"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**arguments(**changes))


@pytest.mark.parametrize("backend", ["reference", "blocked", "triton"])
@pytest.mark.parametrize("label", [20, -1, 2**40])
def test_a_label_out_of_range_is_named(backend, label):
    labels = torch.tensor([-100, 3, -100, label, 4, 99])
    with pytest.raises(ValueError, match=rf"labels\[3\] is {label}: labels are 0 … 19, or -100 for rows to leave out"):
        linear_cross_entropy(**arguments(labels=labels), backend=backend)


@pytest.mark.parametrize("label", [20, -1, 2**40])
@pytest.mark.parametrize("backend", ["blocked", "triton"])
def test_unchecked_it_makes_the_loss_nan_and_reads_nothing(backend, label):
    labels = torch.tensor([1, 2, 3, label, 4, 5])
    made = arguments(labels=labels)
    made["hidden"] = torch.randn(6, 8, requires_grad=True)
    losses = linear_cross_entropy(**made, reduction="none", check_labels=False, backend=backend)
    assert losses.isnan().tolist() == [False, False, False, True, False, False]
    losses.sum().backward()


def test_int32_labels_count_as_well():
    made = arguments(labels=torch.arange(6, dtype=torch.int32))
    torch.testing.assert_close(linear_cross_entropy(**made), torch.tensor(20.0).log())


def test_float64_on_triton_is_refused():
    made = arguments(hidden=torch.zeros(6, 8, dtype=torch.float64), weight=torch.zeros(20, 8, dtype=torch.float64))
    with pytest.raises(BackendUnavailableError, match="no 'triton' implementation for this call"):
        linear_cross_entropy(**made, backend="triton")


@pytest.mark.parametrize("backend", ["reference", "blocked", "triton"])
def test_autocast_decides_the_products_dtype_and_the_loss_stays_float32(backend):
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 8), torch.randn(20, 8)
    labels = torch.arange(6)
    with torch.autocast("cpu", dtype=torch.float16):
        loss = linear_cross_entropy(hidden, weight, labels, backend=backend)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, linear_cross_entropy(hidden.half(), weight.half(), labels, backend=backend))
