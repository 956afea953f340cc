"""Matrix products on a CPU, by whichever of PyTorch's libraries multiplies the dtype fastest."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

_BFLOAT16_PROBES = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
# A variable of either name may hold oneDNN to fewer instructions than the CPU has: to some without bfloat16, or without
# float16, which came later.
_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
_WITHOUT_BFLOAT16 = {"sse41", "avx", "avx2", "avx2_vnni", "avx512_core", "avx512_core_vnni"}
_WITHOUT_FLOAT16 = {*_WITHOUT_BFLOAT16, "avx2_vnni_2", "avx512_core_bf16"}
# A widened product holds three blocks of at most so many float32 elements, 1 MiB each.
BLOCK_ELEMENTS = 256 * 1024
BLOCK_SIDE = 512


def product(a: Tensor, b: Tensor) -> Tensor:
    """a (n, k) · b (k, m), of any strides; no gradient.

    float32 goes through oneDNN, which uses AVX-512 wherever it is. MKL, PyTorch's own choice, does so on Intel's
    processors only: measured on 2 Zen 5 cores, 370 GFLOP/s against 180. Autocast changes nothing.
    """
    if a.numel() and b.numel() and goes_through_onednn(a):
        b = b if b.is_contiguous() or b.T.is_contiguous() else b.contiguous()  # no fast code for a matrix with gaps
        return torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], "")
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


def widened_product(
    a: Tensor, b: Tensor, out: Tensor, *, bias: Tensor | None = None, scale: float = 1.0, add: bool = False
) -> None:
    """Write scale · a (n, k) · b (k, m) + bias (m,) into out (n, m), or ``add`` it; 16-bit matrices of any strides.

    Blocks of both are multiplied in float32, and each result is rounded once. On a CPU without instructions for the
    dtype, PyTorch's own products hold a whole result in float32, or take 7 to 350 times as long (AVX2, 256 × 256 by
    256 × 8192). These go through MKL: oneDNN keeps some mebibytes for the shapes it has seen.
    """
    rows, columns, depth = _block_sizes(*a.shape, b.shape[1])
    scratch = [a.new_empty(size, dtype=torch.float32) for size in (rows * depth, depth * columns, rows * columns)]
    for row in blocks(a.shape[0], rows):
        for column in blocks(b.shape[1], columns):
            for inner in blocks(a.shape[1], depth):
                b_a, b_b = _widened(a[row, inner], scratch[0]), _widened(b[inner, column], scratch[1])
                b_out = scratch[2][: b_a.shape[0] * b_b.shape[1]].view(b_a.shape[0], b_b.shape[1])
                torch.addmm(b_out, b_a, b_b, beta=1 if inner.start else 0, alpha=scale, out=b_out)
            if bias is not None:
                b_out.add_(bias[column])
            if add:
                out[row, column] += b_out
            else:
                out[row, column] = b_out


def is_widened(like: Tensor) -> bool:
    """Whether products of such tensors are to be made by `widened_product`."""
    return like.device.type == "cpu" and like.dtype in (torch.bfloat16, torch.float16) and not multiplies(like.dtype)


def goes_through_onednn(like: Tensor) -> bool:
    """Whether products of such tensors do."""
    return like.dtype == torch.float32 and like.device.type == "cpu" and _onednn_multiplies()


def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16, which are very slow where they are emulated."""
    return multiplies(torch.bfloat16)


@cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for products of a 16-bit dtype, and oneDNN may use them."""
    limit = next((os.environ[name].lower() for name in _LIMITS if os.environ.get(name)), "")
    if dtype == torch.bfloat16:
        able = any(getattr(torch.cpu, probe, lambda: False)() for probe in _BFLOAT16_PROBES)
        return able and limit not in _WITHOUT_BFLOAT16
    probe = getattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: False)
    return torch.backends.mkldnn.is_available() and probe() and limit not in _WITHOUT_FLOAT16


def blocks(count: int, size: int) -> Iterator[slice]:
    """0 … count in consecutive slices of ``size``."""
    for first in range(0, count, size):
        yield slice(first, min(count, first + size))


@cache
def _onednn_multiplies() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _widened(x: Tensor, scratch: Tensor) -> Tensor:
    """A float32 copy in scratch memory, in the order that x lies in: to transpose takes ten times as long."""
    wide = scratch[: x.numel()]
    wide = wide.view(x.shape) if x.stride(1) <= x.stride(0) else wide.view(x.T.shape).T
    return wide.copy_(x)


def _block_sizes(rows: int, depth: int, columns: int) -> tuple[int, int, int]:
    """Rows, columns and depth of a block; flat matrices are cut into long ones."""
    depth = min(depth, BLOCK_SIDE)
    rows = min(rows, BLOCK_ELEMENTS // max(depth, min(columns, BLOCK_SIDE)))
    return rows, min(columns, BLOCK_ELEMENTS // max(depth, rows)), depth
