"""The kernels of a gated MLP's gate, as the report compiles them."""

from __future__ import annotations

import torch

from benchmarks.codegen.compiling import Variant
from llm2vec_fast.kernels.swiglu import ACTIVATIONS, triton

ROWS, COLUMNS = 512, 14336


def swiglu(
    which: str, activation: str, dtype: torch.dtype = torch.bfloat16, columns: int = COLUMNS, halves: bool = False
) -> Variant:
    """Forward or backward as launched; ``halves``: gate and up are those of one tensor."""
    both = torch.empty(ROWS, 2 * columns, dtype=dtype)
    gate, up = both.chunk(2, dim=1) if halves else (torch.empty(ROWS, columns, dtype=dtype) for _ in range(2))
    out, other = (torch.empty(ROWS, columns, dtype=dtype) for _ in range(2))
    if which == "forward":
        kernel, arguments = triton._forward_kernel, triton.forward_arguments(gate, up, out, activation)
    else:
        kernel, arguments = triton._backward_kernel, triton.backward_arguments(out, gate, up, out, other, activation)
    words = ("swiglu", which, activation, f"d{columns}", str(dtype).removeprefix("torch."), "halves" if halves else "")
    return Variant("-".join(filter(None, words)), kernel, arguments, products="none", wide=0.95)


def main_variants(architecture: str) -> list[Variant]:
    """Both activations, forward and backward."""
    return [swiglu(which, activation) for which in ("forward", "backward") for activation in ACTIVATIONS]


def all_variants(architecture: str) -> list[Variant]:
    """These, halves of one tensor, an odd width, and float32."""
    others = [
        variant
        for which in ("forward", "backward")
        for variant in (
            swiglu(which, "silu", halves=True),
            swiglu(which, "silu", columns=1536),
            swiglu(which, "silu", torch.float32),
        )
    ]
    return [*main_variants(architecture), *others]
