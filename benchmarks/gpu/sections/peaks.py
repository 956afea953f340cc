"""What the device reaches at best: a large matrix product, and a large copy. Everything else is held against them."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.gpu.section import Context, Row
from benchmarks.gpu.timing import Clock

MATMUL = 8192
COPY_BYTES = 2 * 2**30


def rows(context: Context) -> Iterator[Row]:
    """Two rates, on random numbers (zeros run faster than real data)."""
    clock = Clock(context.smoke)
    yield {"case": "device", "contender": _device(context)}
    size = 64 if context.smoke else MATMUL
    dtype = torch.float32 if context.smoke else torch.bfloat16
    a, b = (torch.randn(size, size, device=context.device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    milliseconds = clock.milliseconds(lambda: torch.mm(a, b, out=out))
    yield _row(f"{size}³ product, {dtype}", "matmul TFLOP/s", milliseconds, 2 * size**3 / 1e9)
    bytes_each = 2**10 if context.smoke else COPY_BYTES
    source = torch.randint(0, 127, (bytes_each,), dtype=torch.int8, device=context.device)
    target = torch.empty_like(source)
    milliseconds = clock.milliseconds(lambda: target.copy_(source))
    yield _row(f"copy of {bytes_each:,} bytes, read and written", "copy GB/s", milliseconds, 2 * bytes_each / 1e6)


def _row(case: str, peak: str, milliseconds: float | None, amount: float) -> Row:
    return {
        "case": case,
        "contender": "PyTorch",
        "peak": peak,
        "ms": milliseconds,
        "rate": None if milliseconds is None else amount / milliseconds,
        "unit": peak.split()[1],
    }


def _device(context: Context) -> str:
    if context.smoke:
        return "no GPU: a smoke run"
    card = torch.cuda.get_device_properties(0)
    software = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    return f"{card.name}, {card.multi_processor_count} multiprocessors, {card.total_memory / 2**30:.0f} GiB, {software}"
