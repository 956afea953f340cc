"""Rotary embedding: as exact as PyTorch in the same dtype, whole or partial, on strided views, forward and backward."""

from __future__ import annotations

import pytest
import torch
from elementwise_cases import BACKEND_IDS, BACKENDS, assert_as_exact, without_gradients
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from llm2vec_fast.kernels import rotary
from llm2vec_fast.kernels.dispatch import BackendUnavailableError
from llm2vec_fast.kernels.rotary.operator import rotary_operator

WIDTHS = [(8, 8), (64, 64), (80, 32), (40, 10), (128, 128)]
SCALINGS = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
    },
    "longrope": {
        "factor": 2.0, "original_max_position_embeddings": 32, "short_factor": [1.0 + i / 8 for i in range(8)],
        "long_factor": [2.0 + i for i in range(8)],
    },
}  # fmt: skip


def inputs(
    width: int, turned: int, dtype: torch.dtype, batch: int = 2, length: int = 7, heads: int = 4
) -> list[Tensor]:
    """q and k as views of one projection's output, (B, H, S, D), with the cosine and sine of angles of their own."""
    generator = torch.Generator().manual_seed(0)
    fused = torch.randn(batch, length, (heads + 2) * width, generator=generator).to(dtype)
    q, k = fused[..., : heads * width], fused[..., heads * width :]
    angles = torch.randn(batch, length, turned, generator=generator)
    halves = [x.unflatten(2, (-1, width)).transpose(1, 2) for x in (q, k)]
    return [*halves, angles.cos().to(dtype), angles.sin().to(dtype)]


@pytest.mark.parametrize(("width", "turned"), WIDTHS)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS, ids=BACKEND_IDS)
def test_as_exact_as_pytorch(backend, dtype, width, turned) -> None:
    given = inputs(width, turned, dtype)
    assert_as_exact(rotary, given, backend, fixed=2)
    without_gradients(rotary, given, backend)


@pytest.mark.parametrize(("batch", "length", "heads"), [(1, 300, 9), (3, 1, 1), (1, 0, 2)])
@pytest.mark.parametrize("backend", ["blocked", "triton"])
def test_long_short_and_empty_batches(backend, batch, length, heads) -> None:
    assert_as_exact(rotary, inputs(16, 16, torch.float32, batch, length, heads), backend, fixed=2)


@pytest.mark.parametrize("backend", ["blocked", "triton"])
def test_one_row_of_angles_serves_the_whole_batch(backend) -> None:
    q, k, cos, sin = inputs(16, 16, torch.float32)
    assert_as_exact(rotary, (q, k, cos[:1], sin[:1]), backend, fixed=2)


@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize("backend", ["reference", "blocked", "triton"])
def test_every_scaling_of_transformers_gives_what_transformers_gives(backend, kind) -> None:
    parameters = {"rope_type": kind, "rope_theta": 10000.0, **SCALINGS[kind]}
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, max_position_embeddings=64, rope_parameters=parameters)
    q, k, *_ = inputs(16, 16, torch.float32, length=100)
    cos, sin = LlamaRotaryEmbedding(config)(q, torch.arange(100)[None])
    for ours, stock in zip(rotary(q, k, cos, sin, backend=backend), apply_rotary_pos_emb(q, k, cos, sin), strict=True):
        torch.testing.assert_close(ours, stock)


@pytest.mark.parametrize("backend", ["reference", "blocked", "triton"])
def test_heads_may_come_after_positions(backend) -> None:
    q, k, cos, sin = inputs(8, 8, torch.float32)
    swapped = rotary(q.transpose(1, 2), k.transpose(1, 2), cos, sin, unsqueeze_dim=2, backend=backend)
    for a, b in zip(swapped, rotary(q, k, cos, sin, backend=backend), strict=True):
        assert torch.equal(a.transpose(1, 2), b)


@pytest.mark.parametrize("backend", ["blocked", "triton"])
def test_results_keep_the_order_in_memory_that_attention_reads(backend) -> None:
    q, k, cos, sin = inputs(8, 8, torch.float32)
    for turned in rotary(q, k, cos, sin, backend=backend):
        assert turned.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("backend", ["blocked", "triton"])
def test_the_input_is_not_written_to(backend) -> None:
    given = inputs(8, 4, torch.float32)
    before = [x.clone() for x in given]
    q, k = rotary(given[0].requires_grad_(), given[1].requires_grad_(), *given[2:], backend=backend)
    (q.sum() + k.sum()).backward()
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


def test_two_dtypes_give_that_of_queries_and_keys() -> None:
    q, k, cos, sin = inputs(8, 8, torch.float16)
    for backend in ("reference", "blocked", "triton"):
        out = rotary(q, k, cos.float(), sin.float(), backend=backend)
        assert [x.dtype for x in out] == [torch.float16] * 2


def test_gradcheck() -> None:
    given = [x.double().detach() for x in inputs(6, 4, torch.float32)]
    q, k, cos, sin = (x.requires_grad_() for x in given)
    assert torch.autograd.gradcheck(rotary, (q, k, cos, sin))
    assert torch.autograd.gradcheck(lambda q, k: rotary(q, k, cos.detach(), sin.detach(), backend="blocked"), (q, k))


def test_a_gradient_of_the_angles_is_the_references_alone() -> None:
    q, k, cos, sin = inputs(8, 8, torch.float32)
    with pytest.raises(BackendUnavailableError, match="rotary"):
        rotary(q, k, cos.requires_grad_(), sin, backend="blocked")


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("triton", [False, True], ids=["blocked", "triton"])
def test_opcheck(triton, transposed) -> None:
    q, k, cos, sin = inputs(8, 6, torch.float32)
    torch.library.opcheck(rotary_operator, (q.requires_grad_(), k.requires_grad_(), cos, sin, transposed, triton))


@pytest.mark.parametrize("backend", ["blocked", "triton"])
def test_it_compiles_whole_and_only_once_as_lengths_change(backend) -> None:
    torch._dynamo.reset()
    counters.clear()

    @torch.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    def step(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k = rotary(q * 2, k, cos, sin, backend=backend)
        return q.square().sum() + (k * 3).sum()

    # PyTorch itself specialises on sizes that happen to be equal, a batch and its heads say.
    for batch, length in ((3, 5), (7, 60), (5, 700), (9, 11)):
        q, k, cos, sin = (x.detach() for x in inputs(16, 16, torch.float32, batch, length))
        loss = step(q.requires_grad_(), k.requires_grad_(), cos, sin)
        loss.backward()
        q, k = rotary(q * 2, k, cos, sin, backend="reference")
        torch.testing.assert_close(loss, q.square().sum() + (k * 3).sum())
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"unsqueeze_dim": 3}, "unsqueeze_dim=3"),
        ({"k": torch.zeros(1, 2, 5, 6)}, r"\(1, 2, 5, 6\)"),
        ({"k": torch.zeros(2, 2, 5, 8)}, "one batch and one length"),
        ({"k": torch.zeros(1, 2, 4, 8)}, "one batch and one length"),
        ({"q": torch.zeros(1, 2, 5, 8, dtype=torch.long)}, "q is torch.int64"),
        ({"cos": torch.zeros(1, 4, 8)}, r"\(1, 4, 8\)"),
        ({"cos": torch.zeros(1, 5, 10), "sin": torch.zeros(1, 5, 10)}, "10 columns"),
        ({"cos": torch.zeros(1, 5, 3), "sin": torch.zeros(1, 5, 3)}, "3 columns"),
    ],
    ids=["unsqueeze", "keys", "batch-of-keys", "length-of-keys", "dtype", "length", "wide", "odd"],
)
def test_what_does_not_fit_is_refused(change, says) -> None:
    given = {"q": torch.zeros(1, 2, 5, 8), "k": torch.zeros(1, 2, 5, 8)}
    angles = {"cos": torch.zeros(1, 5, 8), "sin": torch.zeros(1, 5, 8)}
    with pytest.raises(ValueError, match=says):
        rotary(**{**given, **angles, **change})
