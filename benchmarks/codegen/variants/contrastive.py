"""The kernels of the contrastive loss, as the report compiles them."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.codegen.compiling import Variant
from benchmarks.codegen.variants import Allowance, Recorded
from llm2vec_fast.kernels.contrastive import configurations, triton
from llm2vec_fast.kernels.contrastive.configurations import Configuration
from llm2vec_fast.kernels.contrastive.rule import Side
from llm2vec_fast.kernels.contrastive.triton_rows import level_rows_kernel

ROWS, WIDTH = 4096, 768
# forward: the rule that most users have, a fixed scale on cosines; then a running maximum, for all others.
FORWARD: dict[str, dict[str, Any]] = {
    "": {"bounded": True},
    "unbounded": {"bounded": False},
    "margin": {"bounded": True, "limit": True},
    "ids": {"bounded": True, "marks": torch.int64},
    "known": {"bounded": True, "marks": torch.int64, "known": 1},
}
WEIGHTS: dict[str, dict[str, Any]] = {
    "": {},
    "symmetric": {"columns": True},
    "margin": {"columns": True, "limit": True},
    "ids": {"marks": torch.int64},
    "known": {"marks": torch.int64, "known": 1},
}
# Rows of 1,000 columns do not begin at multiples of 32 bytes, of which the compiler would have to be told.
_UNALIGNED = Allowance("rows that the compiler cannot know to begin at whole vectors", synchronous=True)
ALLOWANCES = {
    (f"contrastive-{which}-D1000-bfloat16", "sm_80"): _UNALIGNED
    for which in ("forward", "weights", "d-queries", "d-documents")
}
MOST_INSTRUCTIONS = {("contrastive-forward-D768-bfloat16", "sm_90"): 180}


def side(
    dtype: torch.dtype, width: int = WIDTH, marks: torch.dtype = torch.int32, limit: bool = False, known: int = 0
) -> Side:
    """Rows with all that any kernel asks of them."""
    values = torch.empty(ROWS)
    rows = torch.empty(ROWS, width, dtype=dtype)
    stretch = values if limit and dtype.itemsize == 2 else None
    marks = torch.empty(ROWS, 1 + known, dtype=marks)
    return Side(rows, values, stretch, marks, None, values if limit else None, *[values] * 3)


def forward(
    architecture: str,
    rule: str = "",
    dtype: torch.dtype = torch.bfloat16,
    width: int = WIDTH,
    config: Configuration | None = None,
) -> Variant:
    """The softmax denominators."""
    settings = dict(FORWARD[rule])
    bounded = settings.pop("bounded")
    config = config or configurations.sums(dtype, architecture, width, "limit" in settings)
    x, y = side(dtype, width, **settings), side(dtype, width, **settings)
    arguments = triton.sums_arguments(
        x, y, torch.empty(()), torch.empty(1, ROWS), torch.empty(1, ROWS), bounded, config
    )
    return Variant(_name("forward", width, dtype, rule), triton._sums_kernel, arguments, _products(dtype))


def weights(
    architecture: str,
    rule: str = "",
    dtype: torch.dtype = torch.bfloat16,
    width: int = WIDTH,
    config: Configuration | None = None,
) -> Variant:
    """A panel of the gradient of the similarities."""
    settings = dict(WEIGHTS[rule])
    columns = settings.pop("columns", False)
    x, y = side(dtype, width, **settings), side(dtype, width, **settings)
    y = y if columns else Side(y.rows, y.inverse, y.stretch, y.marks)
    config = config or configurations.weights(dtype, architecture, triton.is_ruled(x, y), x.limit is not None)
    positives = (torch.empty(ROWS, dtype=torch.int64), torch.empty(ROWS))
    panel = torch.empty(ROWS, triton.PANEL_COLUMNS, dtype=dtype)
    arguments = triton.weights_arguments(x, y, panel, torch.empty(()), positives, 0, config)
    return Variant(_name("weights", width, dtype, rule), triton._weights_kernel, arguments, _products(dtype))


def product(
    architecture: str,
    transposed: bool,
    dtype: torch.dtype = torch.bfloat16,
    width: int = WIDTH,
    config: Configuration | None = None,
    margin: bool = False,
) -> Variant:
    """The panel, or its transpose, times rows; with a margin, rows that are to be stretched."""
    config = config or configurations.product(dtype, architecture, width, margin)
    panel, rows = torch.empty(ROWS, ROWS, dtype=dtype), torch.empty(ROWS, width, dtype=dtype)
    stretch = torch.empty(ROWS) if margin else None
    arguments = triton.product_arguments(panel, rows, torch.empty(ROWS, width), stretch, transposed, config)
    name = _name("d-documents" if transposed else "d-queries", width, dtype, "margin" if margin else "")
    return Variant(name, triton._product_kernel, arguments, _products(dtype))


def level_rows(margin: bool, dtype: torch.dtype = torch.bfloat16, width: int = WIDTH) -> Variant:
    """Rows brought to length one; with a margin, to lengths of 1/2 to 1."""
    x, block = torch.empty(ROWS, width, dtype=dtype), 1 << (width - 1).bit_length()
    arguments = {
        "p_x": x, "p_level": x, "p_inverse": torch.empty(ROWS), "p_stretch": torch.empty(ROWS), "stride_x": width,
        "stride_l": width, "width": width, "HAS_STRETCH": margin, "BLOCK": block, "num_warps": 4, "num_stages": 1,
    }  # fmt: skip
    name = _name("unit-rows", width, dtype, "margin" if margin else "")
    return Variant(name, level_rows_kernel, arguments, "none")


def main_variants(architecture: str) -> list[Variant]:
    """What most models run."""
    return [forward(architecture), weights(architecture), product(architecture, False), product(architecture, True)]


def all_variants(architecture: str) -> list[Variant]:
    """Every rule, float32, and a width that no tile divides."""
    return [
        *main_variants(architecture),
        *(forward(architecture, rule) for rule in FORWARD if rule),
        *(weights(architecture, rule) for rule in WEIGHTS if rule),
        *(product(architecture, transposed, margin=True) for transposed in (False, True)),
        forward(architecture, width=1000),
        weights(architecture, width=1000),
        *(product(architecture, transposed, width=1000) for transposed in (False, True)),
        forward(architecture, dtype=torch.float32),
        weights(architecture, dtype=torch.float32),
        product(architecture, True, torch.float32),
        level_rows(False),
        level_rows(True),
    ]


def _name(which: str, width: int, dtype: torch.dtype, rule: str) -> str:
    words = (f"contrastive-{which}", f"D{width}", str(dtype).removeprefix("torch."), rule)
    return "-".join(filter(None, words))


def _products(dtype: torch.dtype) -> str:
    return "plain" if dtype == torch.float32 else "tensor"


RECORDED = (
    Recorded("Inf-CL", "forward", "sm_90", "TF32", 1423),
    Recorded("Inf-CL", "forward", "sm_80", "TF32", 1522),
)
