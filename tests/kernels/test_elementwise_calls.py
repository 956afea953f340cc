"""What the element-wise operations call on a CPU, and what they keep: the rules by which they pay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from elementwise_cases import BLOCKED_DTYPES, assert_as_exact, without_gradients
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from llm2vec_fast.kernels import SequenceLayout, pool, rms_norm, rotary, swiglu
from llm2vec_fast.kernels.rms_norm import blocked as rms_norm_blocked
from llm2vec_fast.kernels.swiglu import ACTIVATIONS
from llm2vec_fast.kernels.swiglu import blocked as swiglu_blocked

ROWS, WIDTH = 6, 16
EPS = 1e-6
LAYOUT = SequenceLayout.from_lengths([ROWS - 2, 2])
CALLS: dict[str, Callable[[Tensor], object]] = {
    "rms_norm": lambda x: rms_norm(x, torch.ones(WIDTH), EPS),
    "add and rms_norm": lambda x: rms_norm(x, torch.ones(WIDTH), EPS, torch.ones_like(x)),
    "rotary": lambda x: rotary(x[None, None], x[None, None], *torch.ones(2, 1, ROWS, WIDTH)),
    "silu": lambda x: swiglu(x, x),
    "gelu_tanh": lambda x: swiglu(x, x, "gelu_tanh"),
    "pool": lambda x: pool(x, LAYOUT),
}


def called(run: Callable[[], object]) -> set[str]:
    """Names of the operators that ran, those inside others too."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    return {event.key for event in profiler.key_averages()}


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def of_ours(names: set[str]) -> set[str]:
    """Operators that this package registered."""
    return {name for name in names if name.startswith("llm2vec_fast")}


@pytest.mark.parametrize("training", [False, True], ids=["use", "training"])
@pytest.mark.parametrize("name", CALLS)
def test_only_a_compiler_is_shown_an_operator(name, training) -> None:
    def step(x: Tensor) -> None:
        out = CALLS[name](x)
        if training:
            (out[0] if isinstance(out, tuple) else out).sum().backward()

    x = random(ROWS, WIDTH).requires_grad_(training)
    with torch.set_grad_enabled(training):
        assert not of_ours(called(lambda: step(x)))
        torch._dynamo.reset()
        compiled = torch.compile(CALLS[name], backend="eager", fullgraph=True)
        assert of_ours(called(lambda: compiled(x)))


@pytest.mark.parametrize("name", CALLS)
def test_gradients_of_gradients_are_refused_and_not_wrong(name) -> None:
    x = random(ROWS, WIDTH).requires_grad_()
    out = CALLS[name](x)
    out = out[0] if isinstance(out, tuple) else out
    (gradient,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


FEW, MANY = 2000, 5000  # rows of 64 on either side of the sizes at which another path begins


@pytest.mark.parametrize("dtype", BLOCKED_DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_norms_bits_depend_neither_on_other_rows_nor_on_a_gradient(offset, dtype) -> None:
    """Else a text would be embedded differently alone and among others: thirty layers make much of one bit."""
    x, weight = random(MANY, 64).to(dtype), random(64).to(dtype)

    def norm(rows: int) -> Tensor:
        added, total = rms_norm(x[:rows], weight, EPS, x[:rows], offset=offset)
        assert torch.equal(added, rms_norm(total, weight, EPS, offset=offset))
        return rms_norm(x[:rows], weight, EPS, offset=offset)

    with torch.no_grad():
        out = norm(MANY)
        assert all(torch.equal(out[:rows], norm(rows)) for rows in (1, FEW))
    x.requires_grad_()
    assert all(torch.equal(out[:rows], norm(rows)) for rows in (1, FEW, MANY))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_16_bit_gates_do_not_depend_on_how_many_rows_there_are(name) -> None:
    """In float32 few elements go through PyTorch's gelu, which differs in the last bit."""
    x = random(MANY, 64).bfloat16()
    with torch.no_grad():
        assert torch.equal(swiglu(x, x, name)[:FEW], swiglu(x[:FEW], x[:FEW], name))


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", BLOCKED_DTYPES, ids=str)
def test_a_norm_in_several_blocks_is_as_exact(dtype, offset, monkeypatch) -> None:
    monkeypatch.setattr(rms_norm_blocked, "BLOCK_ELEMENTS", 100)
    monkeypatch.setattr(rms_norm_blocked, "FEW_ELEMENTS", 0)
    tensors = random(21, 33).to(dtype), random(33).to(dtype)

    def norm(x: Tensor, weight: Tensor, backend: str) -> Tensor:
        return rms_norm(x, weight, EPS, offset=offset, backend=backend)

    without_gradients(norm, tensors, "blocked")
    assert_as_exact(norm, tensors, "blocked")


@pytest.fixture
def in_blocks(monkeypatch) -> None:
    """Gates take the path of large tensors, a few rows at a time."""
    monkeypatch.setattr(swiglu_blocked, "BLOCK_ELEMENTS", 100)
    monkeypatch.setattr(swiglu_blocked, "FEW_ELEMENTS", 0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("dtype", BLOCKED_DTYPES, ids=str)
def test_a_gate_in_several_blocks_is_as_exact(dtype, scale, activation, in_blocks) -> None:
    both = (random(3, 7, 66) * scale).to(dtype)

    def gated(gate: Tensor, up: Tensor, backend: str) -> Tensor:
        return swiglu(gate, up, activation, backend=backend)

    for tensors in (both.chunk(2, dim=-1), both.transpose(0, 1).chunk(2, dim=-1)):
        without_gradients(gated, tensors, "blocked")
        assert_as_exact(gated, tensors, "blocked")


def test_very_large_gates_stay_finite_in_blocks(in_blocks) -> None:
    gate = torch.tensor([-3e4, -1e3, -100.0, 0.0, 100.0, 3e4])
    assert_as_exact(
        lambda x, up, backend: swiglu(x, up, "gelu_tanh", backend=backend), (gate, torch.ones(6)), "blocked"
    )


def test_gelu_takes_one_sigmoid_and_no_tanh(in_blocks) -> None:
    gate, up = (random(ROWS, WIDTH).bfloat16().requires_grad_() for _ in range(2))
    names = called(lambda: swiglu(gate, up, "gelu_tanh").sum().backward())
    assert not any(name.startswith(("aten::gelu", "aten::tanh")) for name in names), names
    assert {"aten::sigmoid_", "aten::sigmoid"} <= names


@pytest.mark.parametrize("more", [0, 1])
def test_a_gate_of_few_elements_takes_pytorchs_gelu(more) -> None:
    x = random(1, swiglu_blocked.FEW_ELEMENTS + more)
    with torch.no_grad():
        assert ("aten::gelu" in called(lambda: swiglu(x, x, "gelu_tanh"))) == (not more)


@pytest.mark.parametrize("name", CALLS)
def test_a_gradient_keeps_nothing_of_the_inputs_size_that_the_model_does_not_hold_anyway(name) -> None:
    x = random(ROWS, WIDTH).requires_grad_()
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = CALLS[name](x)
    held = {tensor.untyped_storage().data_ptr() for tensor in (x, *(out if isinstance(out, tuple) else (out,)))}
    extra = [tensor for tensor in kept if tensor.untyped_storage().data_ptr() not in held]
    allowed = 2 if name == "rotary" else 0  # cosines and sines, which every layer shares
    assert sum(tensor.numel() >= x.numel() for tensor in extra) == allowed
