"""The kernels and configurations that the dispatcher can choose, as the report compiles them."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.codegen.compiling import Variant
from llm2vec_fast.kernels.attention import configurations
from llm2vec_fast.kernels.attention import triton as attention
from llm2vec_fast.kernels.layout import SequenceLayout
from llm2vec_fast.kernels.tiles import tile_table

ROWS, HEADS, KV_HEADS = 512, 8, 2
HEAD_DIMS = (64, 128)
OTHER_HEAD_DIMS = (32, 80, 96, 256)
RULES: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "window": {"window": 128},
    "softcap": {"softcap": 50.0},
}


def attention_forward(
    architecture: str,
    head_dim: int,
    dtype: torch.dtype = torch.bfloat16,
    rule: str = "",
    config: configurations.Configuration | None = None,
) -> Variant:
    """The forward kernel as it is launched for a head size, dtype and rule on an architecture."""
    layout = SequenceLayout.from_lengths([ROWS])
    config = config or configurations.forward(head_dim, dtype, architecture)
    q, out = (torch.empty(ROWS, HEADS, head_dim, dtype=dtype) for _ in range(2))
    k, v = (torch.empty(ROWS, KV_HEADS, head_dim, dtype=dtype) for _ in range(2))
    settings = {"causal": False, "window": None, "softcap": None, "scale": head_dim**-0.5, **RULES.get(rule, {})}
    arguments = attention.forward_arguments(
        q,
        k,
        v,
        out,
        torch.empty(HEADS, ROWS),
        tile_table(layout.starts, layout.lengths, config.block_q),
        config,
        **settings,
    )
    name = "-".join(filter(None, ("attention-forward", f"D{head_dim}", str(dtype).removeprefix("torch."), rule)))
    return Variant(name, attention._forward_kernel, arguments)


def main_variants(architecture: str) -> list[Variant]:
    """The configurations most models run, by which the gate is judged."""
    return [attention_forward(architecture, head_dim) for head_dim in HEAD_DIMS]


def all_variants(architecture: str) -> list[Variant]:
    """Every configuration the dispatcher can choose, and every rule at least once."""
    others = [attention_forward(architecture, head_dim) for head_dim in OTHER_HEAD_DIMS]
    rules = [attention_forward(architecture, 64, rule=rule) for rule in RULES]
    dtypes = [attention_forward(architecture, 64, dtype) for dtype in (torch.float16, torch.float32)]
    return [*main_variants(architecture), *others, *rules, *dtypes]
