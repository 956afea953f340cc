"""The pooling kernels, as the report compiles them."""

from __future__ import annotations

import torch

from benchmarks.codegen.compiling import Variant
from llm2vec_fast.kernels.layout import SequenceLayout
from llm2vec_fast.kernels.pooling import triton

ROWS, COLUMNS, SPLITS = 512, 2048, 4
WIDE = 0.7  # outside the loop: where the sequence lies, and one row in or out


def pool(
    which: str, mode: str, skipping: bool = False, dtype: torch.dtype = torch.bfloat16, columns: int = COLUMNS
) -> Variant:
    """Forward or backward as launched."""
    layout = SequenceLayout.from_lengths([ROWS])
    skip = torch.zeros(1, dtype=torch.int64) if skipping else None
    hidden, sequences = torch.empty(ROWS, columns, dtype=dtype), (layout.starts, layout.lengths, skip)
    if which == "forward":
        kernel, out = triton._forward_kernel, torch.empty(1, SPLITS, columns)
        arguments = triton.forward_arguments(hidden, *sequences, out, mode)
    else:
        kernel, grad = triton._backward_kernel, torch.empty(1, columns)
        arguments = triton.backward_arguments(grad, *sequences, hidden, SPLITS, mode)
    words = (f"pool-{which}", mode, "skip" if skipping else "", f"d{columns}", str(dtype).removeprefix("torch."))
    return Variant("-".join(filter(None, words)), kernel, arguments, products="none", wide=WIDE)


def main_variants(architecture: str) -> list[Variant]:
    """The mean, with prompts left out."""
    return [pool(which, "mean", skipping=True) for which in ("forward", "backward")]


def all_variants(architecture: str) -> list[Variant]:
    """Every mode, an odd width, and float32."""
    others = [pool(which, mode) for which in ("forward", "backward") for mode in ("weighted_mean", "last", "first")]
    wide = [pool("forward", "mean", columns=576), pool("forward", "mean", dtype=torch.float32)]
    return [*main_variants(architecture), *others, *wide]
