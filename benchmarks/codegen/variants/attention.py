"""The attention kernels and configurations that the dispatcher can choose, as the report compiles them."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch

from benchmarks.codegen.compiling import Variant
from benchmarks.codegen.variants import Allowance, Recorded
from llm2vec_fast.kernels.attention import configurations, triton, triton_backward, triton_launch
from llm2vec_fast.kernels.attention.configurations import Configuration
from llm2vec_fast.kernels.layout import SequenceLayout
from llm2vec_fast.kernels.tiles import tile_table

ROWS, HEADS, KV_HEADS = 512, 8, 2
HEAD_DIMS = (64, 128)
OTHER_HEAD_DIMS = (16, 32, 40, 72, 80, 96, 112, 256)
RULES: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "window": {"window": 128},
    "softcap": {"softcap": 50.0},
    "dropout": {"threshold": 19661},
    "all": {"causal": True, "window": 128, "softcap": 50.0, "threshold": 19661},
}
PASSES = ("forward", "dk-dv", "dq")
DESCRIBED = ("sm_90", "sm_100")  # architectures with tensor descriptors
_MMA_SYNC = "tiles of 32 keys by mma.sync: with the 64 that wgmma takes, 428 bytes are spilled, some in the loop"
# In each the accumulators and the logits fill the register file; nothing is spilled in the inner loop.
ALLOWANCES = {
    ("attention-forward-D128-bfloat16-softcap", "sm_90"): Allowance("tanh's terms beside 128 × 128 logits", 8),
    ("attention-forward-D112-bfloat16", "sm_80"): Allowance("masks of the columns beside the tile of 128", 12),
    ("attention-forward-D128-bfloat16-dropout", "sm_80"): Allowance("counters of the random numbers", 8),
    **{
        (f"attention-dk-dv-D256-bfloat16-{rule}", "sm_90"): Allowance(_MMA_SYNC, tensor_instruction="mma.sync")
        for rule in ("causal", "all")
    },
    ("attention-dq-D64-float32-all", "sm_80"): Allowance("every rule at once, without tensor cores", 32),
    ("attention-forward-D128-bfloat16-all", "sm_80"): Allowance("counters of the random numbers", 8),
    **{
        ("attention-dq-D256-float32", chip): Allowance("rows of 256 without tensor cores, in the smallest tiles", count)
        for chip, count in (("sm_80", 8), ("sm_90", 8), ("sm_100", 16))
    },
    **{
        (f"attention-dk-dv-D256-bfloat16{rule}-pointers", chip): Allowance(
            "tiles of 64 keys, which wgmma and tcgen05 take, spill 428 bytes in the loop", tensor_instruction="mma.sync"
        )
        for rule, chip in product(("", "-all"), DESCRIBED)
    },
    # With Triton 3.6. Smaller tiles spill nothing, but 128 × 64 takes 673 (window) and 1350 (softcap) instructions a
    # MFLOP rather than 483 and 1154, and tiles for mma.sync have a lower peak.
    ("attention-forward-D128-bfloat16-window", "sm_90", "3.6"): Allowance("the window beside 128 × 128 logits", 16),
    ("attention-forward-D128-bfloat16-softcap", "sm_90", "3.6"): Allowance("tanh's terms beside 128 × 128 logits", 24),
    ("attention-dk-dv-D256-bfloat16", "sm_90", "3.6"): Allowance("two accumulators of 64 × 256", 8),
    ("attention-dk-dv-D128-float32-all", "sm_90", "3.6"): Allowance("every rule at once, without tensor cores", 16),
    ("attention-dk-dv-D16-bfloat16", "sm_100"): Allowance("logits leave tensor memory all at once", 40),
    ("attention-dk-dv-D64-bfloat16-all", "sm_100"): Allowance("every rule at once", 16),
    ("attention-dk-dv-D256-bfloat16-causal", "sm_100"): Allowance("masks beside two accumulators of 64 × 256", 48),
    ("attention-dk-dv-D256-bfloat16-all", "sm_100"): Allowance("every rule beside two accumulators of 64 × 256", 204),
    ("attention-dk-dv-D128-tf32", "sm_100"): Allowance("float32 tiles", 8),
    ("attention-dq-D128-float32-all", "sm_100"): Allowance("every rule at once, without tensor cores", 108),
    ("attention-forward-D64-float32-all", "sm_100"): Allowance("every rule at once, without tensor cores", 16),
}


def attention(
    which: str,
    architecture: str,
    head_dim: int,
    dtype: torch.dtype = torch.bfloat16,
    rule: str = "",
    *,
    describable: bool = True,
    tf32: bool = False,
    config: Configuration | None = None,
) -> Variant:
    """One of `PASSES` as it is launched for a head size, dtype and rule.

    ``describable``: tensors that descriptors can describe; ``tf32``: the user allowed TF32; ``config`` replaces the
    chosen configuration.
    """
    choose = {
        "forward": configurations.forward,
        "dk-dv": configurations.backward_keys,
        "dq": configurations.backward_queries,
    }[which]
    settings = {"causal": False, "window": None, "softcap": None, "threshold": 0, **RULES.get(rule, {})}
    seed = torch.zeros(1, dtype=torch.int64) if settings["threshold"] else None
    settings = triton_launch.Rule(**settings, scale=head_dim**-0.5, seed=seed)
    config = config or choose(head_dim, dtype, architecture, describable, settings.demand)
    layout = SequenceLayout.from_lengths([ROWS])
    q, grad = (torch.empty(ROWS, HEADS, head_dim, dtype=dtype) for _ in range(2))
    k, v = (torch.empty(ROWS, KV_HEADS, head_dim, dtype=dtype) for _ in range(2))
    sums = configurations.sums_like(q)
    numbers = torch.empty(HEADS, 4, ROWS)
    table = tile_table(layout.starts, layout.lengths, config.block_k if which == "dk-dv" else config.block_q)
    if which == "forward":
        kernel = triton._forward_kernel
        arguments = triton.forward_arguments(q, k, v, grad, sums, table, config, settings)
    elif which == "dk-dv":
        kernel = triton_backward._dk_dv_kernel
        arguments = triton_backward.dk_dv_arguments(q, k, v, grad, numbers, k, v, table, config, settings)
    else:
        kernel = triton_backward._dq_kernel
        arguments = triton_backward.dq_arguments(q, k, v, grad, numbers, q, table, config, settings)
    if tf32:
        arguments["PRECISION"] = "tf32"
    how = "" if describable else "pointers"
    words = (f"attention-{which}", f"D{head_dim}", "tf32" if tf32 else str(dtype).removeprefix("torch."), rule, how)
    products = "plain" if dtype == torch.float32 else "tensor"
    return Variant("-".join(filter(None, words)), kernel, arguments, products)


def main_variants(architecture: str) -> list[Variant]:
    """The configurations most models run, by which the gate is judged."""
    return [attention(which, architecture, head_dim) for which in PASSES for head_dim in HEAD_DIMS]


def all_variants(architecture: str) -> list[Variant]:
    """Every configuration that the dispatcher can choose, every head size by which tiles differ, and every rule."""
    variants = main_variants(architecture)
    for which, head_dim in product(PASSES, OTHER_HEAD_DIMS):
        variants.append(attention(which, architecture, head_dim))
    variants += [attention(which, architecture, 256, rule=rule) for which in PASSES for rule in ("causal", "all")]
    for which, head_dim in product(PASSES, HEAD_DIMS):
        variants += [attention(which, architecture, head_dim, rule=rule) for rule in RULES]
        variants.append(attention(which, architecture, head_dim, torch.float16))
        variants.append(attention(which, architecture, head_dim, torch.float32, tf32=True))
    for which, head_dim in product(PASSES, (*HEAD_DIMS, 256)):
        variants += [attention(which, architecture, head_dim, torch.float32, rule) for rule in ("", "all")]
        if architecture in DESCRIBED:
            variants += [attention(which, architecture, head_dim, rule=rule, describable=False) for rule in ("", "all")]
    return variants


_TUTORIAL = "Triton tutorial, fused attention"
_FLA = "flash-linear-attention"
_AITER = "aiter"
RECORDED = (
    Recorded(_TUTORIAL, "forward D64", "sm_90", "128×64 w4 s2", 988, 187, 0),
    Recorded(_TUTORIAL, "forward D64", "sm_80", "128×64 w4 s2", 1295, 255, 2),
    Recorded(_TUTORIAL, "forward D128", "sm_90", "128×64 w4 s2", 589, 252, 0),
    Recorded(_TUTORIAL, "forward D128", "sm_80", "128×64 w4 s2", 1195, 255, 112),
    Recorded(_TUTORIAL, "forward D128", "sm_90", "128×128 w8 s2", 491, 188, 0),
    Recorded(_TUTORIAL, "forward D128", "sm_80", "128×128 w8 s2", 936, 255, 30),
    Recorded(_TUTORIAL, "backward D64", "sm_90", "", 643),
    Recorded(_TUTORIAL, "backward D64", "sm_80", "", 1204, None, 128),
    Recorded(_TUTORIAL, "backward D128", "sm_90", "", 709, None, 772, "wgmmas serialised"),
    Recorded(_FLA, "forward D64, causal", "sm_90", "", 1488),
    Recorded(_FLA, "forward D64, causal", "sm_80", "", 1873),
    Recorded(_FLA, "forward D128, causal", "sm_90", "", 916),
    Recorded(_FLA, "forward D128, causal", "sm_80", "", 1333),
    Recorded(_FLA, "dk and dv D64", "sm_90", "", 906),
    Recorded(_FLA, "dk and dv D64", "sm_80", "", 1095),
    Recorded(_FLA, "dq D64", "sm_90", "", 844),
    Recorded(_FLA, "dq D64", "sm_80", "", 1017),
    Recorded(_FLA, "dk and dv D128", "sm_90", "", 583, None, 198),
    Recorded(_FLA, "dk and dv D128", "sm_80", "", 965),
    Recorded(_FLA, "dq D128", "sm_90", "", 519),
    Recorded(_FLA, "dq D128", "sm_80", "", 1198),
    Recorded(_AITER, "forward D64", "sm_90", "", 1101),
    Recorded(_AITER, "forward D64", "sm_80", "", 1364),
    Recorded(_AITER, "forward D128", "sm_90", "", 744),
    Recorded(_AITER, "forward D128", "sm_80", "", 1051),
)
