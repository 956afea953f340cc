"""SwiGLU of a large batch of rows, as a fraction of the copy bandwidth."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.gpu.operation import compare_with_reference, resolve
from benchmarks.gpu.section import Context, Row


def rows(context: Context) -> Iterator[Row]:
    """Forward reads two and writes one; backward reads three and writes two."""
    swiglu = resolve("swiglu")
    shape, dtype = ((6, 40), torch.float16) if context.smoke else ((16384, 8192), torch.bfloat16)
    gate, up = (torch.randn(shape, device=context.device).to(dtype) for _ in range(2))
    megabytes = gate.nbytes / 1e6
    yield from compare_with_reference(
        context,
        f"{shape[0]} × {shape[1]}",
        lambda gate, up, backend: swiglu(gate, up, backend=backend),
        (gate, up),
        {"forward": 3 * megabytes, "backward": 5 * megabytes},
    )
