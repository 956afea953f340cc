"""Attention against what else computes it, at uniform lengths, at real ones, and in a skewed batch.

FLOP are those of the scores that exist, 4 · Σ length² · heads · head_dim forward and 2.5 times that backward, whatever
a contender computes beyond them (padding, recomputation), so that rates compare as times do.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu.contest import Contender, Work, compete
from benchmarks.gpu.lengths import real_lengths
from benchmarks.gpu.section import Context, NotAvailableError, Row
from benchmarks.gpu.timing import Clock
from llm2vec_fast.kernels import SequenceLayout, attention

TOKENS = 16384
WIDTH = 2048  # heads · head_dim
# The cases that the targets are about come first: time may run out.
CASES = (
    *((head_dim, "16384") for head_dim in (128, 64)),
    *((head_dim, "real") for head_dim in (128, 64)),
    *((head_dim, length) for length in ("4096", "1024", "512", "128") for head_dim in (128, 64)),
    *((128, kind) for kind in ("skewed", "8192", "2048", "256")),
)
SMOKE_CASES = ((16, "real"), (16, "16"))
SMOKE_TOKENS, SMOKE_LONGEST = 32, 13
JUDGED_HEADS = 2
SECONDS_A_CASE = 8.0
SECONDS_TO_COMPILE_FLEX = 30.0
LARGEST_PADDED = 24 * 2**30  # bytes of one contender's tensors


def rows(context: Context) -> Iterator[Row]:
    """Every contender at every case."""
    clock = Clock(context.smoke)
    for head_dim, kind in SMOKE_CASES if context.smoke else CASES:
        lengths = case_lengths(kind, context.smoke)
        name = f"D{head_dim}, {kind}"
        if context.left() < SECONDS_A_CASE:
            yield {"case": name, "verdict": "not run", "note": "no time left"}
            continue
        torch.manual_seed(0)
        problem = Problem(lengths, head_dim, 2 if context.smoke else WIDTH // head_dim, context)
        yield from compete(problem.work(name), problem.makers(), clock, context.smoke)


def case_lengths(kind: str, smoke: bool) -> list[int]:
    """Uniform ("512"), "real" (docstrings, as recorded) or "skewed" (one text of half the tokens, many short ones)."""
    tokens = SMOKE_TOKENS if smoke else TOKENS
    if kind == "real":
        return real_lengths(tokens, SMOKE_LONGEST if smoke else None)
    if kind == "skewed":
        return [tokens // 2, *[16] * (tokens // 32)]
    return [int(kind)] * (tokens // int(kind))


class Problem:
    """q, k, v and the gradient of the output, packed (T, H, D), and every contender for them."""

    def __init__(self, lengths: list[int], head_dim: int, heads: int, context: Context) -> None:
        self.lengths, self.smoke, self.device, self.context = lengths, context.smoke, context.device, context
        dtype = torch.float16 if context.smoke else torch.bfloat16  # the interpreter gets bfloat16 products wrong
        self.layout = SequenceLayout.from_lengths(lengths, device=context.device)
        shape = (4, sum(lengths), heads, head_dim)
        *self.packed, self.upstream = torch.randn(shape, device=context.device).to(dtype).unbind(0)
        self.judged = sorted({0, heads - 1})[:JUDGED_HEADS]

    def work(self, name: str) -> Work:
        """The exact result of the first and last head, and what plain PyTorch makes of them."""
        truths = []
        for dtype in (torch.float64, self.upstream.dtype):
            q, k, v, upstream = (x[:, self.judged].to(dtype) for x in (*self.packed, self.upstream))
            leaves = [x.requires_grad_() for x in (q, k, v)]
            out = attention(*leaves, self.layout, backend="reference")
            truths.append(tuple(x.detach() for x in (out, *torch.autograd.grad(out, leaves, upstream))))
        heads, head_dim = self.upstream.shape[1:]
        forward = 4 * sum(n * n for n in self.lengths) * heads * head_dim / 1e9
        amount = {"forward": forward, "backward": 2.5 * forward}
        return Work(name, *truths, amount, peak=self.context.peaks.get("matmul TFLOP/s"))

    def makers(self) -> dict[str, Callable[[], Contender]]:
        """Contenders by name, made when their turn comes."""
        return {
            "ours, Triton": functools.partial(self._ours, "triton"),
            "flash-attn": functools.partial(self._ours, "flash"),
            "SDPA, padded": self._padded,
            "SDPA a sequence": self._by_sequence,
            "cuDNN through SDPA": self._cudnn,
            "FlexAttention, compiled": self._flex,
        }

    def _ours(self, backend: str) -> Contender:
        def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention(q, k, v, self.layout, backend=backend)

        return self._packed(forward)

    def _by_sequence(self) -> Contender:
        def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            parts = zip(*(x.transpose(0, 1).split(self.lengths, dim=1) for x in (q, k, v)), strict=True)
            outputs = [scaled_dot_product_attention(*(x[None] for x in part))[0] for part in parts]
            return torch.cat(outputs, dim=1).transpose(0, 1)

        return self._packed(forward, f"{len(self.lengths)} calls")

    def _padded(self) -> Contender:
        mask = None
        if len(set(self.lengths)) > 1:
            positions = torch.arange(self.layout.max_length, device=self.device)
            mask = (positions < self.layout.lengths[:, None])[:, None, None]
        return self._dense(functools.partial(scaled_dot_product_attention, attn_mask=mask))

    def _cudnn(self) -> Contender:
        if self.smoke:
            raise NotAvailableError("cuDNN needs a GPU")
        if len(set(self.lengths)) > 1:
            raise NotAvailableError("a padded batch needs a mask that this backend refuses")

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return scaled_dot_product_attention(q, k, v)

        return self._runs(self._dense(attend))

    def _flex(self) -> Contender:
        if self.smoke:
            raise NotAvailableError("it is compiled for GPUs")
        if self.context.left() < SECONDS_TO_COMPILE_FLEX:
            raise NotAvailableError("no time left to compile it")
        from torch.nn.attention.flex_attention import create_block_mask

        attend = _compiled_flex()
        if len(set(self.lengths)) == 1:
            return self._runs(self._dense(attend))
        texts = self.layout.sequence_ids

        def same_text(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return texts[query] == texts[key]

        torch.cuda.synchronize()
        began = time.perf_counter()
        mask = create_block_mask(same_text, None, None, self.layout.total, self.layout.total, device=self.device)
        torch.cuda.synchronize()
        note = f"and {1e3 * (time.perf_counter() - began):.0f} ms to make the mask, once a batch"

        def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend(*(x.transpose(0, 1)[None] for x in (q, k, v)), block_mask=mask)[0].transpose(0, 1)

        return self._runs(self._packed(forward, note))

    def _packed(self, forward: Callable[..., Tensor], note: str = "") -> Contender:
        return Contender(forward, self._leaves(self.packed), (self.upstream,), self._heads, note)

    def _dense(self, attend: Callable[..., Tensor]) -> Contender:
        """On a padded batch (B, S, H, D), as a model that pads holds it; padding it is not timed."""
        batch, longest = len(self.lengths), self.layout.max_length
        uniform = batch * longest == self.layout.total
        size = 10 * batch * longest * math.prod(self.upstream.shape[1:]) * self.upstream.element_size()
        if size > LARGEST_PADDED:
            raise NotAvailableError(f"{batch} × {longest} padded rows, about {size / 1e9:.0f} GB in all")
        rows = torch.cat([i * longest + torch.arange(n) for i, n in enumerate(self.lengths)]).to(self.device)

        def pad(x: Tensor) -> Tensor:
            flat = x.new_zeros(batch * longest, *x.shape[1:])
            return flat.index_copy(0, rows, x).view(batch, longest, *x.shape[1:])

        def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

        leaves = self._leaves([pad(x) for x in self.packed])
        note = "" if uniform else f"{batch * longest:,} rows for {self.layout.total:,} tokens"
        return Contender(forward, leaves, (pad(self.upstream),), lambda x: self._heads(x.flatten(0, 1)[rows]), note)

    def _runs(self, contender: Contender) -> Contender:
        """The contender, if this PyTorch can run it here at all."""
        try:
            contender.gradients(contender.outputs())
        except (RuntimeError, NotImplementedError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise NotAvailableError(str(error).strip().splitlines()[0]) from None
        return contender

    def _leaves(self, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        return tuple(x.detach().requires_grad_() for x in tensors)

    def _heads(self, x: Tensor) -> Tensor:
        return x[:, self.judged]


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.recompile_limit = 64  # beyond it, FlexAttention would write its scores out
    return torch.compile(flex_attention)
