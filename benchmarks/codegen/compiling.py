"""Compiles a Triton kernel for a chip that is not there, with exactly what a launch would pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
OPTIONS = ("num_warps", "num_stages", "maxnreg")
ELEMENTS = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
    torch.uint8: "u8",
}


@dataclass(frozen=True)
class Variant:
    """A kernel and what it is launched with.

    Attributes:
        name: as the report prints it.
        kernel: the function under `triton.jit` (a heuristics or autotune wrapper is not understood).
        arguments: every parameter by name, constexprs included, besides num_warps and num_stages.
        products: "tensor": multiplies matrices on the chip's tensor cores, which the gate then insists on; "plain":
            multiplies float32 without them; "none": an element-wise kernel or a reduction.
        wide: for "none", the least share of bytes that must go to and from memory 16 bytes at a time and thread.
    """

    name: str
    kernel: Any
    arguments: dict[str, Any]
    products: Literal["tensor", "plain", "none"] = "tensor"
    wide: float = 0.0


def compile_for(variant: Variant, architecture: str) -> Any:
    """The compiled kernel, specialised as Triton's launcher would: on 16-divisible and on unit integers."""
    return triton.compile(source_of(variant), target=TARGETS[architecture], options=options_of(variant))


def source_of(variant: Variant) -> ASTSource:
    """What is compiled."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(variant.kernel.params):
        value = variant.arguments[parameter.name]
        if parameter.is_constexpr or value is None or (_specialised(parameter, value) and value == 1):
            signature[parameter.name], constants[(index,)] = "constexpr", value
            continue
        signature[parameter.name] = _type_of(value)
        if isinstance(value, Tensor) or (_specialised(parameter, value) and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(variant.kernel, signature, constants, attributes)


def options_of(variant: Variant) -> dict[str, int]:
    """How it is launched."""
    return {name: variant.arguments[name] for name in OPTIONS if variant.arguments.get(name) is not None}


def _specialised(parameter: Any, value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and not parameter.do_not_specialize


def _type_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"*{ELEMENTS[value.dtype]}"
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{ELEMENTS[value.base.dtype]}{list(value.block_shape)}>"
    return {bool: "i1", int: "i32", float: "fp32"}[type(value)]
