"""The cross-entropy kernels and configurations that the dispatcher can choose, as the report compiles them."""

from __future__ import annotations

import torch

from benchmarks.codegen.compiling import Variant
from benchmarks.codegen.variants import Allowance, Recorded
from llm2vec_fast.kernels.cross_entropy import configurations, triton, triton_backward
from llm2vec_fast.kernels.cross_entropy.configurations import Configuration
from llm2vec_fast.kernels.cross_entropy.rule import Problem, Rule

ROWS, VOCABULARY = 1024, 2048
WIDTH = 4096
OTHER_WIDTHS = (576, 577)  # of the second, rows do not start at multiples of 16 bytes
PASSES = ("forward", "gradient", "hidden", "weight")
RULES = ("softcap", "all")
# The accumulators fill the register file; what is spilled is read and written after the loop.
# Triton 3.9 and 3.6 spill in different variants.
ALLOWANCES = {
    ("cross-entropy-gradient-d4096-bfloat16-softcap", "sm_80"): Allowance("softcap's slope", spilled_bytes=56),
    ("cross-entropy-gradient-d4096-bfloat16-all", "sm_80"): Allowance("every option at once", spilled_bytes=48),
    ("cross-entropy-gradient-d4096-bfloat16-all", "sm_90"): Allowance("every option at once", spilled_bytes=16),
    # With steps of 32 it spills 424 bytes and takes 542 instructions a MFLOP rather than 505.
    ("cross-entropy-forward-d4096-bfloat16-all", "sm_80", "3.6"): Allowance(
        "bias, cap and smoothing of 128 × 256 logits at once, after the loop", spilled_bytes=432
    ),
}
# Goals that the recorded kernels set: less than half of theirs, forward on sm_80 520. Each backward loop counts alone.
MOST_INSTRUCTIONS = {
    ("cross-entropy-forward-d4096-bfloat16", "sm_90"): 170,
    ("cross-entropy-forward-d4096-bfloat16", "sm_80"): 520,
    **{
        (f"cross-entropy-{which}-d4096-bfloat16", architecture): most
        for which in ("gradient", "hidden", "weight")
        for architecture, most in (("sm_90", 499), ("sm_80", 700))
    },
}


def cross_entropy(
    which: str,
    architecture: str,
    width: int = WIDTH,
    dtype: torch.dtype = torch.bfloat16,
    rule: str = "",
    config: Configuration | None = None,
) -> Variant:
    """One of `PASSES`: the log-sum-exp, the logits' gradient, and its products that give the two gradients."""
    hidden, weight = torch.empty(ROWS, width, dtype=dtype), torch.empty(VOCABULARY, width, dtype=dtype)
    kind = (dtype, width, configurations.UNALIGNED if width * dtype.itemsize % 16 else architecture)
    transposed = which == "weight"
    if which == "forward":
        config = config or configurations.forward(*kind)
    elif which == "gradient":
        config = config or configurations.gradient(*kind)
    else:
        config = config or configurations.product(*kind, transposed)
    extras = rule == "all"
    numbers = torch.empty(ROWS)
    labels = torch.zeros(ROWS, dtype=torch.int64)
    formula = Rule(30.0 if rule else None, 0.1 if extras else 0.0, 1e-4 if extras else 0.0, VOCABULARY)
    problem = Problem(hidden, weight, torch.empty(VOCABULARY, dtype=dtype) if extras else None, labels, labels, formula)
    optional = numbers if extras else None
    buffer = torch.empty(ROWS, VOCABULARY, dtype=dtype)
    products = "plain" if dtype == torch.float32 else "tensor"
    name = "-".join(filter(None, (f"cross-entropy-{which}", f"d{width}", str(dtype).removeprefix("torch."), rule)))
    if which == "forward":
        arguments = triton.forward_arguments(hidden, problem, labels, numbers, numbers, optional, optional, config)
        return Variant(name, triton._forward_kernel, arguments, products)
    if which == "gradient":
        arguments = triton_backward.gradient_arguments(
            hidden, problem, labels, numbers, numbers, numbers, buffer, optional, config
        )
        return Variant(name, triton_backward._gradient_kernel, arguments, products)
    b = hidden if transposed else weight
    out = weight[None] if transposed else torch.empty(2, ROWS, width)
    arguments = triton_backward.product_arguments(
        buffer,
        b,
        out,
        numbers if transposed else None,
        transposed,
        not transposed,
        b.shape[0] // out.shape[0] // config.block_inner,
        config,
    )
    return Variant(name, triton_backward._product_kernel, arguments, products)


def main_variants(architecture: str) -> list[Variant]:
    """What most models run."""
    return [cross_entropy(which, architecture) for which in PASSES]


def all_variants(architecture: str) -> list[Variant]:
    """Every configuration that the dispatcher can choose."""
    variants = main_variants(architecture)
    for which in PASSES:
        variants += [cross_entropy(which, architecture, width) for width in OTHER_WIDTHS]
        variants += [cross_entropy(which, architecture, dtype=dtype) for dtype in (torch.float16, torch.float32)]
    for rule in RULES:
        variants += [cross_entropy(which, architecture, rule=rule) for which in ("forward", "gradient")]
    return variants


_PEER = "cut-cross-entropy"
RECORDED = (
    Recorded(_PEER, "forward", "sm_90", "256×128×32 w8 s3", 385, 177, 0),
    Recorded(_PEER, "forward", "sm_80", "256×128×32 w8 s3", 717, 250, 0),
    Recorded(_PEER, "backward, gradient of hidden", "sm_90", "", 999, None, None, "takes a lock"),
    Recorded(_PEER, "backward, gradient of hidden", "sm_80", "", 1402, None, 93, "takes a lock"),
)
