"""Mean pooling of real lengths, as a fraction of the copy bandwidth."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.gpu.lengths import real_lengths
from benchmarks.gpu.operation import compare_with_reference, resolve
from benchmarks.gpu.section import Context, Row
from llm2vec_fast.kernels import SequenceLayout


def rows(context: Context) -> Iterator[Row]:
    """Forward reads the rows and writes one float32 row a text; backward the other way round."""
    pool = resolve("pool")
    tokens, width = (40, 24) if context.smoke else (65536, 2048)
    dtype = torch.float16 if context.smoke else torch.bfloat16
    layout = SequenceLayout.from_lengths(real_lengths(tokens, 9 if context.smoke else None), device=context.device)
    hidden = torch.randn(tokens, width, device=context.device).to(dtype)
    megabytes = (hidden.nbytes + 4 * len(layout) * width) / 1e6
    yield from compare_with_reference(
        context,
        f"{tokens} tokens of {len(layout)} texts, {width} columns",
        lambda hidden, backend: pool(hidden, layout, "mean", backend=backend),
        (hidden,),
        {"forward": megabytes, "backward": megabytes},
    )
