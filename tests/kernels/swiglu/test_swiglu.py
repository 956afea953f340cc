"""The gate of a gated MLP: as exact as PyTorch in the same dtype, forward and backward, on halves of one tensor too."""

from __future__ import annotations

import pytest
import torch
from elementwise_cases import BACKEND_IDS, BACKENDS, assert_as_exact, without_gradients
from torch import Tensor
from torch._dynamo.utils import counters

from llm2vec_fast.kernels import swiglu
from llm2vec_fast.kernels.dispatch import BackendUnavailableError
from llm2vec_fast.kernels.swiglu import ACTIVATIONS
from llm2vec_fast.kernels.swiglu.operator import swiglu_backward_operator, swiglu_operator

SHAPES = [(1, 1), (7, 40), (2, 3, 33), (21, 1100), (0, 8), (5,)]


def inputs(shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    gate, up = (torch.randn(shape, generator=generator) * scale for _ in range(2))
    return gate.to(dtype), up.to(dtype)


def gated(activation: str):
    return lambda gate, up, backend: swiglu(gate, up, activation, backend=backend)


@pytest.mark.parametrize(
    ("scale", "activation"), [(1e-3, "silu"), (1.0, "gelu_tanh"), (30.0, "silu"), (30.0, "gelu_tanh")]
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS, ids=BACKEND_IDS)
def test_as_exact_as_pytorch(backend, dtype, shape, scale, activation) -> None:
    assert_as_exact(gated(activation), inputs(shape, dtype, scale), backend)
    without_gradients(gated(activation), inputs(shape, dtype, scale), backend)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", ["blocked", "triton"])
def test_very_large_gates_stay_finite(backend, activation) -> None:
    gate = torch.tensor([-3e4, -1e3, -100.0, 0.0, 100.0, 3e4])
    assert_as_exact(gated(activation), (gate, torch.ones(6)), backend)


@pytest.mark.parametrize("backend", ["blocked", "triton"])
def test_halves_of_one_tensor(backend) -> None:
    both, _ = inputs((3, 5, 96), torch.float32)
    assert_as_exact(gated("silu"), both.chunk(2, dim=-1), backend)


@pytest.mark.parametrize("backend", ["blocked", "triton"])
def test_the_inputs_are_not_written_to(backend) -> None:
    tensors = [x.requires_grad_() for x in inputs((4, 8), torch.float32)]
    before = [x.detach().clone() for x in tensors]
    swiglu(*tensors, backend=backend).sum().backward()
    with torch.no_grad():
        swiglu(*tensors, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_gradcheck(backend, activation) -> None:
    tensors = [x.requires_grad_() for x in inputs((3, 5), torch.float64)]
    assert torch.autograd.gradcheck(lambda gate, up: swiglu(gate, up, activation, backend=backend), tensors)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("triton", [False, True], ids=["blocked", "triton"])
def test_opcheck(triton, activation) -> None:
    gate, up = inputs((5, 24), torch.float32)
    torch.library.opcheck(swiglu_operator, (gate.requires_grad_(), up.requires_grad_(), activation, triton))
    detached = gate.detach(), up.detach()
    torch.library.opcheck(
        swiglu_backward_operator, (torch.ones(5, 24), *detached, activation, triton),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


@pytest.mark.parametrize("backend", ["blocked", "triton"])
def test_it_compiles_whole_and_only_once_as_rows_change(backend) -> None:
    torch._dynamo.reset()
    counters.clear()

    @torch.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    def step(gate: Tensor, up: Tensor) -> Tensor:
        return swiglu(gate * 2, up, backend=backend).square().sum()

    for rows in (5, 64, 700, 3):
        gate, up = (x.requires_grad_() for x in inputs((rows, 24), torch.float32))
        loss = step(gate, up)
        loss.backward()
        torch.testing.assert_close(loss, swiglu(gate * 2, up, backend="reference").square().sum())
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"activation": "relu6"}, "'relu6' is unknown"),
        ({"up": torch.ones(3, 8)}, r"up is \(3, 8\)"),
        ({"up": torch.ones(2, 8).double()}, "float64"),
        ({"gate": torch.ones(2, 0), "up": torch.ones(2, 0)}, r"gate is \(2, 0\)"),
        ({"gate": torch.ones(2, 8).long(), "up": torch.ones(2, 8).long()}, "int64"),
    ],
    ids=["activation", "shape", "dtype", "no-columns", "integers"],
)
def test_what_does_not_fit_is_refused(change, says) -> None:
    with pytest.raises(ValueError, match=says):
        swiglu(**{"gate": torch.ones(2, 8), "up": torch.ones(2, 8), **change})


def test_float64_on_triton_is_refused() -> None:
    with pytest.raises(BackendUnavailableError, match="swiglu"):
        swiglu(torch.ones(1, 8).double(), torch.ones(1, 8).double(), backend="triton")
