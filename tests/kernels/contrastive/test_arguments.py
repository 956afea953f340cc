"""What the loss cannot compute is refused in one sentence that names the value and the way out."""

import pytest
import torch

from llm2vec_fast.kernels.contrastive import contrastive_loss
from llm2vec_fast.kernels.dispatch import BackendUnavailableError


def _rows(count=4, width=8, dtype=torch.float32):
    return torch.ones(count, width, dtype=dtype)


@pytest.mark.parametrize(
    ("queries", "documents", "message"),
    [
        (_rows()[0], _rows(), "pass \\(N, d\\) and \\(M, d\\)"),
        (_rows(), _rows(width=9), "shapes \\(4, 8\\) and \\(4, 9\\)"),
        (_rows(), _rows(3), "4 queries and 3 documents"),
        (_rows(0), _rows(), "at least one row"),
        (_rows(), _rows(dtype=torch.float16), "one floating-point dtype"),
        (_rows(dtype=torch.int64), _rows(dtype=torch.int64), "one floating-point dtype"),
        (_rows(), _rows().to("meta"), "cpu and documents on meta"),
    ],
)
def test_rows_that_do_not_fit_are_refused(queries, documents, message):
    with pytest.raises(ValueError, match=message):
        contrastive_loss(queries, documents)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"positives": torch.tensor([0, 1, 2, 4])}, "positives holds 4: documents are numbered 0 … 3"),
        ({"positives": torch.tensor([0, -1, 2, 3])}, "positives holds -1"),
        ({"positives": torch.tensor([0, 1])}, "positives is torch.int64 of shape \\(2,\\)"),
        ({"positives": torch.tensor([0.0, 1, 2, 3])}, "positives is torch.float32"),
        ({"ids": torch.tensor([0, 1, 2])}, "ids is torch.int64 of shape \\(3,\\)"),
        (
            {"known": torch.tensor([[1], [2]]), "ids": torch.arange(4)},
            r"known is torch.int64 of .* pass \(4, K\) int32",
        ),
        ({"known": torch.tensor([1, 2, 3, 4]), "ids": torch.arange(4)}, "known is torch.int64 of shape \\(4,\\)"),
        ({"known": torch.zeros(4, 1, dtype=torch.int64)}, "known is given and ids is not"),
        ({"guide": (_rows(), _rows(3))}, r"guide holds .* of shape \(3, 8\) .* the documents: pass .*\(4, g\)"),
        ({"guide": (_rows(),)}, "guide holds 1 tensors"),
        ({"guide": (_rows(), _rows(width=7))}, r"of shape \(4, 7\)"),
        ({"scale": 0.0}, "scale=0.0 is not a positive number"),
        ({"scale": float("nan")}, "scale=nan"),
        ({"scale": torch.tensor(-2.0)}, "scale=-2.0"),
        ({"scale": torch.ones(2)}, "one floating-point element"),
        ({"symmetric": True, "document_negatives": True}, "symmetric=True and document_negatives=True"),
        ({"similarity": "euclidean"}, "similarity='euclidean' is unknown"),
        ({"reduction": "batchmean"}, "reduction='batchmean' is unknown"),
        ({"false_negative_margin": float("inf")}, "false_negative_margin=inf"),
        ({"backend": "cuda"}, "backend='cuda' is unknown"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        contrastive_loss(_rows(), _rows(), **settings)


def test_the_reference_across_ranks_is_refused():
    with pytest.raises(BackendUnavailableError, match="no 'reference' implementation for this call"):
        contrastive_loss(_rows(), _rows(), group=object(), backend="reference")


def test_a_guide_on_triton_is_refused():
    with pytest.raises(BackendUnavailableError, match="no 'triton' implementation for this call"):
        contrastive_loss(_rows(), _rows(), guide=(_rows(), _rows()), backend="triton")


def test_float64_on_triton_is_refused():
    with pytest.raises(BackendUnavailableError, match="no 'triton' implementation for this call"):
        contrastive_loss(_rows(dtype=torch.float64), _rows(dtype=torch.float64), backend="triton")
