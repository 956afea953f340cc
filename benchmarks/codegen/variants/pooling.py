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
        kernel = triton._max_kernel if mode == "max" else triton._forward_kernel
        out = torch.empty(1, SPLITS, columns, dtype=torch.int64 if mode == "max" else torch.float32)
        arguments = triton.forward_arguments(hidden, *sequences, out, mode)
    else:
        kernel, grad = triton._backward_kernel, torch.empty(1, columns)
        places = torch.empty(1, columns, dtype=torch.int32)
        arguments = triton.backward_arguments(grad, places, *sequences, hidden, SPLITS, mode)
    words = (f"pool-{which}", mode, "skip" if skipping else "", f"d{columns}", str(dtype).removeprefix("torch."))
    return Variant("-".join(filter(None, words)), kernel, arguments, products="none", wide=WIDE)


def main_variants(architecture: str) -> list[Variant]:
    """The mean, with prompts left out."""
    return [pool(which, "mean", skipping=True) for which in ("forward", "backward")]


def all_variants(architecture: str) -> list[Variant]:
    """Every mode, an odd width, and float32."""
    modes = ("weighted_mean", "mean_sqrt_len", "max", "last", "first")
    others = [pool(which, mode) for which in ("forward", "backward") for mode in modes]
    wide = [pool("forward", "mean", columns=576), pool("forward", "mean", dtype=torch.float32)]
    return [*main_variants(architecture), *others, *wide]
