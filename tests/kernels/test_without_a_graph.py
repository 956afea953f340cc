"""Every operation computes the same with and without a graph: GradCache and reentrant checkpointing rely on it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from llm2vec_fast import kernels
from llm2vec_fast.kernels.layout import SequenceLayout

LAYOUT = SequenceLayout.from_lengths([9, 1, 17, 13])
ROWS, WIDE = LAYOUT.total, 24


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def heads(seed: int, count: int = 2) -> Tensor:
    return drawn(ROWS, count, 12, seed=seed)


LABELS = torch.randint(60, (ROWS,), generator=torch.Generator().manual_seed(1)).masked_fill(drawn(ROWS) > 0.5, -100)
ANGLES = drawn(1, ROWS, 12)
# Tensors that take a gradient → result, or several.
OPERATIONS: dict[str, tuple[Callable[..., Tensor | tuple[Tensor, ...]], list[Tensor]]] = {
    "rms_norm": (lambda x, w: kernels.rms_norm(x, w, 1e-6), [drawn(ROWS, WIDE), drawn(WIDE)]),
    "rms_norm of a sum": (
        lambda x, w, r: kernels.rms_norm(x, w, 1e-6, residual=r), [drawn(ROWS, WIDE), drawn(WIDE), drawn(ROWS, WIDE)]
    ),
    "swiglu": (lambda gate, up: kernels.swiglu(gate, up, "silu"), [drawn(ROWS, WIDE), drawn(ROWS, WIDE, seed=1)]),
    "rotary": (
        lambda q, k: kernels.rotary(q, k, ANGLES.cos(), ANGLES.sin()),
        [x.transpose(0, 1)[None] for x in (heads(1), heads(2))],
    ),
    "pool": (lambda x: kernels.pool(x, LAYOUT, "weighted_mean", normalize=True), [drawn(ROWS, WIDE)]),
    "linear_cross_entropy": (
        lambda x, w: kernels.linear_cross_entropy(x, w, LABELS), [drawn(ROWS, WIDE), drawn(60, WIDE, seed=1)]
    ),
    "contrastive_loss": (
        lambda q, d, s: kernels.contrastive_loss(q, d, scale=s),
        [drawn(9, WIDE), drawn(20, WIDE, seed=1), torch.tensor(20.0)],
    ),
    "lora_linear": (
        lambda x, down, up: kernels.lora_linear(x, drawn(30, WIDE), None, down, up, 0.5, 0.2),
        [drawn(ROWS, WIDE), drawn(4, WIDE), drawn(30, 4)],
    ),
    "attention": (lambda q, k, v: kernels.attention(q, k, v, LAYOUT), [heads(1), heads(2), heads(3)]),
    "attention under dropout": (
        lambda q, k, v: kernels.attention(q, k, v, LAYOUT, dropout_p=0.3), [heads(1), heads(2), heads(3)]
    ),
}  # fmt: skip


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", OPERATIONS)
def test_it_computes_the_same(name: str, mode: Callable[[], torch.autograd.grad_mode.no_grad]) -> None:
    run, tensors = OPERATIONS[name]
    results = []
    for context in (torch.enable_grad, mode):
        torch.manual_seed(7)
        with context():
            out = run(*(x.detach().requires_grad_() for x in tensors))
        results.append([x.detach() for x in (out if isinstance(out, tuple) else (out,))])
        assert all(
            x.requires_grad == (context is torch.enable_grad) for x in (out if isinstance(out, tuple) else (out,))
        )
    for ours, expected in zip(*results, strict=True):
        if name.startswith("attention"):  # sequences are grouped otherwise: other sums, the same weights
            torch.testing.assert_close(ours, expected)
        else:
            assert torch.equal(ours, expected)
