"""What attention cannot compute is refused in one sentence that names the value and the way out."""

import pytest
import torch

from llm2vec_fast.kernels.attention import attention
from llm2vec_fast.kernels.dispatch import BackendUnavailableError
from llm2vec_fast.kernels.layout import SequenceLayout


def _tensors(q_shape=(6, 4, 8), k_shape=(6, 2, 8), dtype=torch.float32):
    return torch.zeros(q_shape, dtype=dtype), torch.zeros(k_shape, dtype=dtype), torch.zeros(k_shape, dtype=dtype)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"q_shape": (1, 6, 4, 8)}, "q as \\(rows, heads, head_dim\\)"),
        ({"k_shape": (6, 2, 16)}, "shapes"),
        ({"q_shape": (5, 4, 8)}, "q has 5 rows, k and v have 6, the layout has 6"),
        ({"k_shape": (6, 3, 8)}, "q has 4 heads and k has 3"),
        ({"k_shape": (6, 0, 8)}, "no head"),
        ({"q_shape": (6, 0, 8)}, "no head"),
        ({"q_shape": (6, 4, 0), "k_shape": (6, 2, 0)}, "a head of no columns"),
        ({"dtype": torch.int64}, "floating-point dtype"),
        ({"dtype": torch.float8_e4m3fn}, "floating-point dtype of 16 bits or more"),
        ({"dtype": torch.complex64}, "floating-point dtype"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(shapes, message):
    with pytest.raises(ValueError, match=message):
        attention(*_tensors(**shapes), SequenceLayout.from_lengths([2, 4]))


def test_mixed_dtypes_and_devices_are_refused():
    q, k, v = _tensors()
    with pytest.raises(ValueError, match="one floating-point dtype"):
        attention(q.half(), k, v, SequenceLayout.from_lengths([6]))
    with pytest.raises(ValueError, match="on cpu, cpu, cpu and meta"):
        attention(q, k, v, SequenceLayout.from_lengths([6], device="meta"))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"window": -1}, "window=-1 is no number of positions"),
        ({"window": 1.5}, "window=1.5 is no number of positions"),
        ({"dropout_p": 0.1, "seed": torch.tensor([1, 2])}, r"seed has shape \(2,\)"),
        ({"dropout_p": 0.1, "seed": torch.tensor([1.5])}, "dtype torch.float32: pass one integer"),
        ({"softcap": 0.0}, "softcap=0.0 is not a positive number"),
        ({"softcap": float("inf")}, "softcap=inf"),
        ({"scale": 0.0}, "scale=0.0 is not a positive number"),
        ({"scale": float("nan")}, "scale=nan"),
        ({"dropout_p": 1.0}, "dropout_p=1.0 is not a probability below 1"),
        ({"dropout_p": -0.1}, "dropout_p=-0.1"),
        ({"backend": "cuda"}, "backend='cuda' is unknown"),
    ],
)
def test_settings_out_of_range_are_refused(rule, message):
    with pytest.raises(ValueError, match=message):
        attention(*_tensors(), SequenceLayout.from_lengths([6]), **rule)


@pytest.mark.parametrize("backend", ["blocked", "triton"])
def test_autocast_decides_the_dtype(backend):
    q, k, v = _tensors()
    with torch.autocast("cpu", dtype=torch.float16):
        out = attention(q, k.half(), v, SequenceLayout.from_lengths([6]), backend=backend)
    assert out.dtype == torch.float16


def test_float64_on_triton_is_refused():
    with pytest.raises(BackendUnavailableError, match="no 'triton' implementation for this call"):
        attention(*_tensors(dtype=torch.float64), SequenceLayout.from_lengths([6]), backend="triton")


@pytest.mark.parametrize("backend", ["reference", "blocked", "triton"])
def test_any_integer_is_the_same_seed(backend):
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 6, 2, 16, generator=generator).unbind(0)
    layout = SequenceLayout.from_lengths([6])
    seeds = (7, torch.tensor([7]), torch.tensor(7), torch.tensor([7], dtype=torch.int32))
    first, *others = (attention(q, k, v, layout, dropout_p=0.5, seed=seed, backend=backend) for seed in seeds)
    assert not torch.equal(first, attention(q, k, v, layout, dropout_p=0.5, seed=8, backend=backend))
    assert all(torch.equal(first, other) for other in others)
