"""A frozen layer with a low-rank adapter: as exact as PyTorch's separate products, and lean."""

from __future__ import annotations

import itertools
import weakref

import pytest
import torch
from numerics import GRADIENT_FACTOR, assert_error_within
from torch._dynamo.testing import CompileCounter

from llm2vec_fast.kernels import lora_linear

SHAPES = [(0, 8, 6, 2), (1, 1, 1, 1), (7, 40, 33, 3), (2, 5, 64, 48, 16), (300, 576, 192, 8)]


def inputs(shape: tuple[int, ...], dtype: torch.dtype, adapter: torch.dtype) -> tuple[torch.Tensor, ...]:
    """x, weight, bias, down, up, and the gradient of the output, the first five rounded to their dtypes."""
    *rows, wide, out, rank = shape
    generator = torch.Generator().manual_seed(wide)
    shapes = ((*rows, wide), (out, wide), (out,), (rank, wide), (out, rank), (*rows, out))
    drawn = [torch.randn(shape, generator=generator) for shape in shapes]
    return tuple(x.to(adapter if i in (3, 4) else dtype) for i, x in enumerate(drawn))


def run(tensors: tuple[torch.Tensor, ...], backend: str, dropout_p: float = 0.0) -> list[torch.Tensor]:
    x, weight, bias, down, up, grad = tensors
    leaves = [tensor.clone().requires_grad_() for tensor in (x, down, up)]
    out = lora_linear(leaves[0], weight, bias, leaves[1], leaves[2], 0.5, dropout_p, backend=backend)
    return [out, *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients_are_as_exact_as_separate_products(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensors = inputs(shape, dtype, dtype)
    ours, plain = run(tensors, "blocked"), run(tensors, "reference")
    exact = run(tuple(tensor.double() for tensor in tensors), "reference")
    assert_error_within(ours[0], plain[0], exact[0])
    for name, *results in zip(("x", "down", "up"), ours[1:], plain[1:], exact[1:], strict=True):
        assert_error_within(*results, GRADIENT_FACTOR, name=f"gradient of {name}")


def test_float32_adapters_of_a_16_bit_layer_get_float32_gradients() -> None:
    ours = run(inputs((30, 64, 48, 4), torch.bfloat16, torch.float32), "blocked")
    assert [x.dtype for x in ours] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]


def test_gradients_in_float64() -> None:
    x, weight, bias, down, up, _ = inputs((2, 3, 5, 4, 2), torch.float64, torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (x, down, up)]
    assert torch.autograd.gradcheck(lambda x, down, up: lora_linear(x, weight, bias, down, up, 0.7), leaves)
    assert torch.autograd.gradcheck(lambda x, down, up: lora_linear(x, weight, None, down, up, 0.7), leaves)


def test_every_subset_of_gradients() -> None:
    tensors = inputs((6, 5, 4, 2), torch.float64, torch.float64)
    _, *expected = run(tensors, "reference")
    for chosen in itertools.product((False, True), repeat=3):
        x, weight, bias, down, up, grad = (tensor.clone() for tensor in tensors)
        leaves = [leaf.requires_grad_(wanted) for leaf, wanted in zip((x, down, up), chosen, strict=True)]
        if any(chosen):
            lora_linear(x, weight, bias, down, up, 0.5).backward(grad)
        for leaf, wanted, gradient in zip(leaves, chosen, expected, strict=True):
            assert (leaf.grad is not None) == wanted
            assert not wanted or torch.allclose(leaf.grad, gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dropout_p", [0.05, 0.3, 0.9])
def test_dropout_keeps_its_share_and_the_gradient_sees_the_same_elements(dropout_p: float) -> None:
    wide = 40_000
    x = torch.ones(1, wide, dtype=torch.float64, requires_grad=True)
    down, zeros = torch.eye(1, wide).double().fill_(1.0), torch.zeros(1, wide).double()
    torch.manual_seed(0)
    out = lora_linear(x, zeros, None, down.requires_grad_(), torch.ones(1, 1).double(), 1.0, dropout_p)
    out.backward()
    kept = x.grad != 0
    deviation = (dropout_p * (1 - dropout_p) / wide) ** 0.5
    assert abs(kept.double().mean().item() - (1 - dropout_p)) < 5 * deviation
    assert torch.equal(down.grad != 0, kept)
    torch.testing.assert_close(out.item(), kept.sum().item() / (1 - dropout_p))
    torch.testing.assert_close(x.grad[kept], torch.full_like(x.grad[kept], 1 / (1 - dropout_p)))


@pytest.mark.parametrize("backend", ["blocked", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_pass_without_a_graph_gives_the_bits_of_one_with_a_graph(dtype: torch.dtype, backend: str) -> None:
    x, weight, bias, down, up, _ = inputs((30, 64, 48, 4), dtype, torch.float32)
    results = []
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        torch.manual_seed(4)
        with mode():
            adapter = down.detach().requires_grad_(), up.detach().requires_grad_()
            out = lora_linear(x.detach().requires_grad_(), weight, bias, *adapter, 0.5, 0.2, backend=backend)
        assert out.requires_grad == (mode is torch.enable_grad)
        results.append((out.detach(), torch.rand(1)))  # and leaves the generator where the other does
    for other in results[1:]:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(other, results[0], strict=True))


def test_without_a_graph_it_keeps_nothing() -> None:
    x, weight, bias, down, up, _ = inputs((30, 64, 48, 4), torch.float32, torch.float32)
    x = x.clone()
    held = weakref.ref(x)
    with torch.no_grad():
        out = lora_linear(x, weight, bias, down.requires_grad_(), up.requires_grad_(), 1.0, 0.2)
    del x
    assert out.grad_fn is None
    assert held() is None


def test_without_a_graph_it_can_be_traced_and_vectorised() -> None:
    x, weight, bias, down, up, _ = inputs((6, 5, 16, 12, 2), torch.float32, torch.float32)
    with torch.no_grad():
        expected = lora_linear(x, weight, bias, down, up, 1.0)
        traced = torch.jit.trace(lambda x: lora_linear(x, weight, bias, down, up, 1.0), x)
        torch.testing.assert_close(traced(x), expected)
        assert "PythonOp" not in str(traced.graph)
        torch.testing.assert_close(torch.vmap(lambda x: lora_linear(x, weight, bias, down, up, 1.0))(x), expected)


@pytest.mark.parametrize("dropout_p", [0.05, 0.2])
def test_its_gradient_under_dropout_is_the_slope_of_what_the_seed_drops(dropout_p: float) -> None:
    """In float64; the loss is linear in each leaf, so that central differences have no error but rounding."""
    *tensors, grad = inputs((20, 12, 9, 3), torch.float64, torch.float64)
    x, weight, bias, down, up = tensors

    def loss(x: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(2)
        return (lora_linear(x, weight, bias, down, up, 0.7, dropout_p) * grad).sum()

    leaves = [leaf.requires_grad_() for leaf in (x, down, up)]
    gradients = torch.autograd.grad(loss(*leaves), leaves)
    for i, gradient in enumerate(gradients):
        with torch.no_grad():
            ends = [loss(*(leaf + step * gradients[j] * (i == j) for j, leaf in enumerate(leaves))) for step in (1, -1)]
        torch.testing.assert_close((ends[0] - ends[1]) / 2, gradient.square().sum())


def test_compiled_it_drops_the_same_with_and_without_a_graph() -> None:
    """Under inductor, which has random numbers of its own."""
    torch._dynamo.reset()
    wide = 256
    zeros, down = torch.zeros(wide, wide), torch.eye(wide).requires_grad_()
    run = torch.compile(lambda x: lora_linear(x, zeros, None, down, torch.eye(wide), 1.0, 0.2))
    out = []
    for graph in (True, False):
        torch.manual_seed(3)
        with torch.set_grad_enabled(graph):
            out.append(run(torch.ones(64, wide)))
    out[0].sum().backward()
    kept = out[0] != 0
    deviation = (0.2 * 0.8 / kept.numel()) ** 0.5
    assert abs(kept.double().mean().item() - 0.8) < 5 * deviation
    assert torch.equal(out[1] != 0, kept)
    torch.testing.assert_close(down.grad[0], kept.sum(0) / 0.8)


def test_it_keeps_x_and_a_few_numbers_a_row() -> None:
    x, weight, bias, down, up, _ = inputs((256, 512, 512, 8), torch.bfloat16, torch.float32)
    x.requires_grad_()
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        lora_linear(x, weight, bias, down.requires_grad_(), up.requires_grad_(), 1.0)
    for known in (x, weight, down, up):
        kept.pop(known.untyped_storage().data_ptr(), None)
    assert sum(kept.values()) == 256 * 8 * 2


def test_one_graph_for_all_row_counts() -> None:
    _, weight, bias, down, up, _ = inputs((1, 16, 8, 2), torch.float32, torch.float32)
    counter = CompileCounter()
    compiled = torch.compile(
        lambda x: lora_linear(x, weight, bias, down, up, 0.5), backend=counter, fullgraph=True, dynamic=True
    )
    for rows in (3, 7, 50):
        x = torch.randn(rows, 16)
        torch.testing.assert_close(compiled(x), lora_linear(x, weight, bias, down, up, 0.5))
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"down": torch.zeros(2, 7)}, r"down has shape \(2, 7\) where x \(3, 5\) asks for \(2, 5\)"),
        ({"up": torch.zeros(4, 3)}, r"up has shape \(4, 3\)"),
        ({"weight": torch.zeros(4, 5, dtype=torch.bfloat16)}, "weight is torch.bfloat16 and x is torch.float32"),
        ({"weight": torch.zeros(4, 5, requires_grad=True)}, "is frozen"),
        ({"dropout_p": 1.0}, "dropout_p=1.0 is not a share"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    given = {"x": torch.zeros(3, 5), "weight": torch.zeros(4, 5), "bias": None, "down": torch.zeros(2, 5)}
    given |= {"up": torch.zeros(4, 2), "scaling": 1.0} | change
    with pytest.raises(ValueError, match=message):
        lora_linear(**given)
