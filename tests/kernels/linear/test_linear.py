"""Linear layers with folded elementwise work: as exact as PyTorch's separate passes, on plain and packed weights."""

from __future__ import annotations

import pytest
import torch
from numerics import assert_error_within

from llm2vec_fast.kernels.linear import ACTIVATIONS, linear, pack_weight, packing_problem

SHAPES = [(1, 1, 1), (7, 40, 33), (100, 64, 48), (300, 576, 192)]
can_pack = pytest.mark.skipif(
    packing_problem(torch.zeros(1, 1, dtype=torch.bfloat16)) is not None, reason="oneDNN has no bf16 here"
)


def inputs(rows: int, wide: int, out: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    shapes = {"x": (rows, wide), "weight": (out, wide), "bias": (out,), "multiplier": (rows, out)}
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def in_dtype(tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


@can_pack
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("after", [None, "multiplier", *ACTIVATIONS])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"T{s[0]}-{s[1]}x{s[2]}")
@torch.no_grad()
def test_packed_weights_are_as_exact_as_pytorch(
    shape: tuple[int, int, int], after: str | None, with_bias: bool
) -> None:
    rounded = in_dtype(inputs(*shape), torch.bfloat16)

    def run(dtype: torch.dtype, pack: bool) -> torch.Tensor:
        given = in_dtype(rounded, dtype)
        weight = pack_weight(given["weight"]) if pack else given["weight"]
        keywords = {"multiplier": given["multiplier"]} if after == "multiplier" else {"activation": after}
        return linear(given["x"], weight, given["bias"] if with_bias else None, **keywords)

    ours = run(torch.bfloat16, pack=True)
    assert_error_within(ours, run(torch.bfloat16, pack=False), run(torch.float64, pack=False))


@can_pack
@torch.no_grad()
def test_views_and_empty_batches_keep_their_shape() -> None:
    weight = torch.randn(5, 8).bfloat16()
    x = torch.randn(2, 6, 8).bfloat16()
    assert linear(x[:, :0], pack_weight(weight)).shape == (2, 0, 5)
    torch.testing.assert_close(linear(x[:, ::2], pack_weight(weight)), linear(x[:, ::2].clone(), pack_weight(weight)))


def test_plain_weights_are_differentiable() -> None:
    given = {name: tensor.requires_grad_() for name, tensor in inputs(3, 4, 5).items()}
    for keywords in ({"activation": "silu"}, {"multiplier": given["multiplier"]}):
        assert torch.autograd.gradcheck(
            lambda x, w, b, k=keywords: linear(x, w, b, **k), (given["x"], given["weight"], given["bias"])
        )


@can_pack
def test_a_packed_weight_refuses_a_gradient() -> None:
    with pytest.raises(RuntimeError, match="no gradient"):
        linear(torch.ones(1, 4, dtype=torch.bfloat16, requires_grad=True), pack_weight(torch.ones(2, 4).bfloat16()))


def test_what_cannot_be_packed_says_why() -> None:
    with pytest.raises(ValueError, match="float32"):
        pack_weight(torch.ones(2, 4))


@pytest.mark.parametrize(
    ("keywords", "says"),
    [
        ({"activation": "relu6"}, "'relu6' is unknown"),
        ({"activation": "silu", "multiplier": torch.ones(1, 2)}, "both activation and multiplier"),
    ],
)
def test_settings_that_make_no_sense_are_refused(keywords: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        linear(torch.ones(1, 4), torch.ones(2, 4), **keywords)
