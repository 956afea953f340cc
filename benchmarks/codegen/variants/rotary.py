"""The rotary embedding's kernel, as the report compiles it."""

from __future__ import annotations

import torch

from benchmarks.codegen.compiling import Variant
from benchmarks.codegen.variants import Allowance
from llm2vec_fast.kernels.rotary import triton

LENGTH, HEADS, KV_HEADS = 512, 32, 8
ALLOWANCES = {
    ("rotary-D128-w96-bfloat16", "gfx942"): Allowance("rows that waves of 64 lanes do not fill", wide=0.85),
}


def rotary(head_dim: int, width: int, transposed: bool = False, dtype: torch.dtype = torch.bfloat16) -> Variant:
    """The kernel as it is launched on views of projections."""
    q, k = (torch.empty(1, LENGTH, heads, head_dim, dtype=dtype).transpose(1, 2) for heads in (HEADS, KV_HEADS))
    cos, sin = (torch.empty(1, LENGTH, width, dtype=dtype) for _ in range(2))
    arguments = triton.rotary_arguments(q, k, cos, sin, q, k, transposed)
    words = (
        "rotary",
        f"D{head_dim}",
        f"w{width}",
        str(dtype).removeprefix("torch."),
        "transposed" if transposed else "",
    )
    return Variant("-".join(filter(None, words)), triton._rotary_kernel, arguments, products="none", wide=0.95)


def main_variants(architecture: str) -> list[Variant]:
    """The head sizes of most models, and the gradient."""
    return [rotary(64, 64), rotary(128, 128), rotary(128, 128, transposed=True)]


def all_variants(architecture: str) -> list[Variant]:
    """These, odd and partly turned heads, and float32."""
    others = [rotary(80, 80), rotary(96, 96), rotary(256, 256), rotary(128, 96), rotary(80, 32)]
    return [*main_variants(architecture), *others, rotary(64, 64, dtype=torch.float32)]
