"""What the launches of the attention kernels share: the rule as arguments, strides, and tensor descriptors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.tools.ragged_tma import create_ragged_descriptor

from . import dropout
from .configurations import Configuration, Demand

# What the hardware asks of a tensor that it copies by descriptor.
ALIGNMENT = 16
MOST_ROWS = 2**30
WIDEST = 8  # elements in one access of 16 bytes


@dataclass(frozen=True)
class Rule:
    """Which keys a query sees, how its logits are made, and what is dropped: the same forward and backward."""

    causal: bool
    window: int | None
    softcap: float | None
    scale: float
    threshold: int  # dropout probability in 65536ths; 0: none
    seed: Tensor | None  # one int64 on the device; None without dropout

    @property
    def demand(self) -> Demand:
        """By which a configuration is chosen."""
        if self.threshold > 0:
            return Demand.DROPOUT
        masked = self.causal or self.window is not None
        return Demand.RULED if masked or self.softcap is not None else Demand.PLAIN

    def arguments(self, q: Tensor, k: Tensor) -> dict[str, Any]:
        """What every kernel is told, by name."""
        return {
            "p_seed": self.seed,
            "window": self.window or 0,
            "scale": self.scale,
            "softcap": self.softcap or 1.0,
            "threshold": self.threshold,
            "gain": dropout.gain_of(self.threshold),
            "GROUP": q.shape[1] // k.shape[1],
            "CAUSAL": self.causal,
            "HAS_WINDOW": self.window is not None,
            "HAS_SOFTCAP": self.softcap is not None,
            "HAS_DROPOUT": self.threshold > 0,
            "PRECISION": _precision(q),
            "HEAD_DIM": q.shape[2],
        }


def strides(**tensors: Tensor) -> dict[str, int]:
    """stride_x and stride_xh, the strides of a row and of a head, for every tensor (rows, heads, D) passed as x=…

    They are counted in UNITs of elements: Triton knows an integer's factors only where 16 divides it, and a head of 40
    shows it none, so that a row would be read two bytes at a time.
    """
    counts = [x.stride(i) for x in tensors.values() for i in (0, 1)]
    unit = math.gcd(WIDEST, *counts)
    rows = {f"stride_{name}": x.stride(0) // unit for name, x in tensors.items()}
    return rows | {f"stride_{name}h": x.stride(1) // unit for name, x in tensors.items()} | {"UNIT": unit}


def readable(x: Tensor) -> Tensor:
    """The tensor itself, whatever its row and head strides; a copy only where elements of a head do not touch."""
    return x if x.stride(2) == 1 else x.contiguous()


def describable(*tensors: Tensor) -> bool:
    """Whether the hardware can copy tiles of these by descriptor: rows and heads start at multiples of 16 bytes."""
    return all(
        x.shape[0] <= MOST_ROWS
        and x.data_ptr() % ALIGNMENT == 0
        and all(x.stride(i) >= x.shape[2] and x.stride(i) * x.element_size() % ALIGNMENT == 0 for i in (0, 1))
        for x in tensors
    )


def sources(config: Configuration, block: int, **tensors: Tensor) -> dict[str, Any]:
    """p_x and p_x_rest for every tensor (rows, heads, D) that a kernel's loop reads ``block`` rows at a time.

    Pointers; or, where the configuration says so, a descriptor for each block of columns. Such a one is ragged: it ends
    with the sequence that is read, and rows past the end come as zeros.
    """
    if not config.described:
        return {f"p_{name}": x for name, x in tensors.items()} | {f"p_{name}_rest": None for name in tensors}
    found: dict[str, Any] = {}
    for name, x in tensors.items():
        width, rest = config.widths(x.shape[2])
        found[f"p_{name}"] = create_ragged_descriptor(x, [block, 1, width])
        found[f"p_{name}_rest"] = create_ragged_descriptor(x, [block, 1, rest]) if rest else None
    return found


def _precision(q: Tensor) -> str:
    """float32 products follow PyTorch's own switch: exact unless the user allowed TF32."""
    return "tf32" if q.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"
