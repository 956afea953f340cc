"""Operations follow their tensors' device, whatever PyTorch's default device is: users and test runs set it to a GPU.

The default here is "meta", on which nothing can be read: a helper tensor made without a device would show at once.
"""

import pytest
import torch

from llm2vec_fast.kernels import SequenceLayout, attention, contrastive_loss, linear_cross_entropy, pool

MASK = [[0, 0, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]]


def _layouts():
    yield SequenceLayout.from_lengths([2, 0, 3, 4], device="cpu")
    yield SequenceLayout.from_attention_mask(torch.tensor(MASK, device="cpu"))
    yield SequenceLayout.from_cu_seqlens(torch.tensor([0, 2, 2, 9], device="cpu"))


@pytest.mark.parametrize("backend", ["reference", "blocked", "triton"])
def test_attention_and_its_gradient(backend):
    results = []
    for default in ("cpu", "meta"):
        with torch.device(default):
            for layout in _layouts():
                generator = torch.Generator().manual_seed(0)
                shape = (4, layout.total, 2, 16)
                *tensors, upstream = torch.randn(shape, generator=generator, device="cpu").unbind(0)
                tensors = [x.detach().requires_grad_() for x in tensors]
                out = attention(*tensors, layout, window=2, dropout_p=0.3, seed=1, backend=backend)
                results.append((out, *torch.autograd.grad(out, tensors, upstream)))
    for expected, result in zip(results[:3], results[3:], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(expected, result, strict=True))


@pytest.mark.parametrize("mode", ["mean", "weighted_mean", "mean_sqrt_len", "max", "last", "first"])
@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_pooling(backend, mode):
    with torch.device("meta"):
        for layout in _layouts():
            hidden = torch.randn(layout.total, 5, device="cpu", requires_grad=True)
            skip = torch.ones(len(layout), dtype=torch.int64, device="cpu")
            torch.autograd.grad(pool(hidden, layout, mode, skip, backend=backend).sum(), hidden)


@pytest.mark.parametrize("backend", ["reference", "blocked", "triton"])
def test_losses(backend):
    generator = torch.Generator().manual_seed(0)
    rows, others = torch.randn((2, 20, 16), generator=generator, device="cpu").requires_grad_().unbind(0)
    labels = torch.tensor([-100, *range(19)], device="cpu")
    ids = torch.arange(20, device="cpu") // 2
    results = []
    for default in ("cpu", "meta"):
        with torch.device(default):
            losses = (
                linear_cross_entropy(rows, others, labels, backend=backend),
                contrastive_loss(rows, others, symmetric=True, ids=ids, false_negative_margin=0.1, backend=backend),
            )
            gradients = [torch.autograd.grad(loss, (rows, others), retain_graph=True) for loss in losses]
            results.append([*losses, *(x for pair in gradients for x in pair)])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_a_layout_of_lengths_is_made_on_the_default_device():
    with torch.device("meta"):
        assert SequenceLayout.from_lengths([1, 2]).device.type == "meta"
    assert SequenceLayout.from_lengths([1, 2]).device.type == "cpu"
