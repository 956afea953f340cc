"""Matrix products on a CPU, by whichever of PyTorch's libraries multiplies the dtype fastest."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

_BFLOAT16_PROBES = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")


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


def goes_through_onednn(like: Tensor) -> bool:
    """Whether products of such tensors do."""
    return like.dtype == torch.float32 and like.device.type == "cpu" and _onednn_multiplies()


@cache
def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16, which are very slow where they are emulated."""
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in _BFLOAT16_PROBES)


@cache
def _onednn_multiplies() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
