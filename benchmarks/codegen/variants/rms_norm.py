"""The RMSNorm kernels, as the report compiles them."""

from __future__ import annotations

import torch

from benchmarks.codegen.compiling import Variant
from benchmarks.codegen.variants import Allowance
from llm2vec_fast.kernels.rms_norm import triton

ROWS, EPS = 512, 1e-6
WIDE = 0.9  # the rest is one number a row
KINDS = ("forward", "forward-residual", "backward", "backward-frozen")
# Half of a wave's lanes have columns in the last part of a row of 576.
ALLOWANCES = {
    (f"rms-norm-{kind}-D576-bfloat16", "gfx942"): Allowance("rows that waves of 64 lanes do not fill", wide=share)
    for kind, share in zip(KINDS, (0.72, 0.84, 0.86, 0.8), strict=True)
}


def rms_norm(kind: str, columns: int, dtype: torch.dtype = torch.bfloat16) -> Variant:
    """One of `KINDS` as it is launched for rows of so many columns."""
    x, y, grad = (torch.empty(ROWS, columns, dtype=dtype) for _ in range(3))
    weight, scales = torch.empty(columns, dtype=dtype), torch.empty(ROWS)
    if kind.startswith("forward"):
        kernel, residual = triton._forward_kernel, y if kind == "forward-residual" else None
        arguments = triton.forward_arguments(x, residual, weight, grad, y, scales, EPS, 0.0)
    else:
        kernel, weight_gradient = triton._backward_kernel, kind == "backward"
        total, partial = (grad, torch.empty(8, columns)) if weight_gradient else (None, torch.empty(0, columns))
        arguments = triton.backward_arguments(grad, total, x, weight, scales, y, partial, 8, 0.0, weight_gradient)
    name = f"rms-norm-{kind}-D{columns}-{str(dtype).removeprefix('torch.')}"
    return Variant(name, kernel, arguments, products="none", wide=WIDE)


def main_variants(architecture: str) -> list[Variant]:
    """The widths of models, and of a head where queries and keys are normed."""
    return [rms_norm(kind, columns) for kind in KINDS for columns in (128, 2048, 4096)]


def all_variants(architecture: str) -> list[Variant]:
    """These, odd widths, the widest, and float32."""
    others = [rms_norm(kind, columns) for kind in KINDS for columns in (64, 576, 8192, 16384)]
    return [*main_variants(architecture), *others, *(rms_norm(kind, 2048, torch.float32) for kind in KINDS)]
