"""Rotary embedding of queries and keys, as a fraction of the copy bandwidth."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.gpu.operation import compare_with_reference, resolve
from benchmarks.gpu.section import Context, Row


def rows(context: Context) -> Iterator[Row]:
    """Each pass reads and writes queries and keys once, and reads the angles; grouped queries, as models have them."""
    rotary = resolve("rotary")
    tokens, heads, kv_heads, head_dim = (5, 2, 1, 16) if context.smoke else (16384, 32, 8, 128)
    dtype = torch.float16 if context.smoke else torch.bfloat16
    q, k = (torch.randn(1, tokens, n, head_dim, device=context.device).to(dtype) for n in (heads, kv_heads))
    angles = torch.rand(1, tokens, head_dim // 2, device=context.device).repeat(1, 1, 2) * 6.28
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    megabytes = (2 * (q.nbytes + k.nbytes) + cos.nbytes + sin.nbytes) / 1e6
    yield from compare_with_reference(
        context,
        f"{tokens} tokens, {heads} and {kv_heads} heads of {head_dim}",
        lambda q, k, cos, sin, backend: rotary(q, k, cos, sin, unsqueeze_dim=2, backend=backend),
        (q, k, cos, sin),
        {"forward": megabytes, "backward": megabytes},
        given=2,
    )
