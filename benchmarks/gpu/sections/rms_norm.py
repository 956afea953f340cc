"""RMSNorm of a large batch of rows, as a fraction of the copy bandwidth."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.gpu.operation import compare_with_reference, resolve
from benchmarks.gpu.section import Context, Row


def rows(context: Context) -> Iterator[Row]:
    """Forward reads and writes the rows; backward reads rows and gradient and writes one."""
    rms_norm = resolve("rms_norm")
    shape, dtype = ((6, 40), torch.float16) if context.smoke else ((16384, 4096), torch.bfloat16)
    x, weight = (torch.randn(size, device=context.device).to(dtype) for size in (shape, shape[1:]))
    megabytes = x.nbytes / 1e6
    yield from compare_with_reference(
        context,
        f"{shape[0]} × {shape[1]}",
        lambda x, weight, backend: rms_norm(x, weight, 1e-6, backend=backend),
        (x, weight),
        {"forward": 2 * megabytes, "backward": 3 * megabytes},
    )
