"""The kernels and configurations that the dispatcher can choose, as the report compiles them."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.codegen.compiling import Variant
from llm2vec_fast.kernels.attention import configurations, triton, triton_backward
from llm2vec_fast.kernels.attention.configurations import Configuration
from llm2vec_fast.kernels.layout import SequenceLayout
from llm2vec_fast.kernels.tiles import tile_table

ROWS, HEADS, KV_HEADS = 512, 8, 2
HEAD_DIMS = (64, 128)
OTHER_HEAD_DIMS = (32, 80, 96, 256)
RULES: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "window": {"window": 128},
    "softcap": {"softcap": 50.0},
    "dropout": {"threshold": 19661},
}
PASSES = ("forward", "dk-dv", "dq")


def attention(
    which: str,
    architecture: str,
    head_dim: int,
    dtype: torch.dtype = torch.bfloat16,
    rule: str = "",
    config: Configuration | None = None,
) -> Variant:
    """One of `PASSES` as it is launched for a head size, dtype and rule; ``config`` replaces the chosen one."""
    choose = {
        "forward": configurations.forward,
        "dk-dv": configurations.backward_keys,
        "dq": configurations.backward_queries,
    }[which]
    config = config or choose(head_dim, dtype, architecture)
    layout = SequenceLayout.from_lengths([ROWS])
    q, grad = (torch.empty(ROWS, HEADS, head_dim, dtype=dtype) for _ in range(2))
    k, v = (torch.empty(ROWS, KV_HEADS, head_dim, dtype=dtype) for _ in range(2))
    rows = torch.empty(HEADS, ROWS)
    table = tile_table(layout.starts, layout.lengths, config.block_k if which == "dk-dv" else config.block_q)
    settings = {"causal": False, "window": None, "softcap": None, "threshold": 0, **RULES.get(rule, {})}
    seed = torch.zeros(1, dtype=torch.int64) if settings["threshold"] else None
    settings = triton.Rule(**settings, scale=head_dim**-0.5, seed=seed)
    if which == "forward":
        kernel = triton._forward_kernel
        arguments = triton.forward_arguments(q, k, v, grad, rows, table, config, settings)
    elif which == "dk-dv":
        kernel = triton_backward._dk_dv_kernel
        arguments = triton_backward.dk_dv_arguments(q, k, v, grad, rows, rows, k, v, table, config, settings)
    else:
        kernel = triton_backward._dq_kernel
        arguments = triton_backward.dq_arguments(q, k, v, grad, rows, rows, q, table, config, settings)
    words = (f"attention-{which}", f"D{head_dim}", str(dtype).removeprefix("torch."), rule)
    return Variant("-".join(filter(None, words)), kernel, arguments)


def main_variants(architecture: str) -> list[Variant]:
    """The configurations most models run, by which the gate is judged."""
    return [attention(which, architecture, head_dim) for which in PASSES for head_dim in HEAD_DIMS]


def all_variants(architecture: str) -> list[Variant]:
    """Every configuration the dispatcher can choose, and every rule at least once."""
    variants = main_variants(architecture)
    for which in PASSES:
        variants += [attention(which, architecture, head_dim) for head_dim in OTHER_HEAD_DIMS]
        variants += [attention(which, architecture, 64, rule=rule) for rule in RULES]
        variants += [attention(which, architecture, 64, dtype) for dtype in (torch.float16, torch.float32)]
    return variants
