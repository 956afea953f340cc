"""Attention modules whose code finds our rotary embedding under the name it calls."""

from __future__ import annotations

import inspect
from functools import cache
from types import FunctionType

import torch
from torch import nn

from ..kernels import rotary
from .swapping import Acceleration, is_replaced, stock_class, subclass, swap

_NAME = "apply_rotary_pos_emb"  # how transformers' modelling files call it, all of them


def fuse_rotary(model: nn.Module, report: Acceleration) -> None:
    """Swap every module whose code calls transformers' rotary function, if that pairs columns as ours does."""
    for module in list(model.modules()):
        forward = inspect.unwrap(stock_class(module).forward)
        if _NAME not in getattr(getattr(forward, "__code__", None), "co_names", ()):
            continue
        if is_replaced(module):
            report.left[stock_class(module).__name__] = "its forward method was replaced on the instance"
        elif not _turns_halves(forward.__globals__[_NAME]):
            report.left[stock_class(module).__name__] = "its rotary embedding pairs columns in another way"
        else:
            swap(module, with_our_rotary, owner=report.owner)
            report.count("rotary")


@cache
def with_our_rotary(stock: type[nn.Module]) -> type[nn.Module]:
    """The same class on other names: the stock code, not a copy of it."""
    forward = inspect.unwrap(stock.forward)
    names = {**forward.__globals__, _NAME: rotary}
    # torch.compile looks names up in the module that __name__ says, where it would find the stock function.
    del names["__name__"]
    ours = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    ours.__kwdefaults__ = forward.__kwdefaults__
    return subclass(stock, ours)


@torch.no_grad()
def _turns_halves(function: FunctionType) -> bool:
    q, k = torch.linspace(-1, 1, 32, dtype=torch.float64, device="cpu").view(2, 1, 2, 2, 4)
    angles = q.new_tensor([[[0.1, 0.7, 0.1, 0.7], [0.4, 1.9, 0.4, 1.9]]])
    try:
        theirs = function(q, k, angles.cos(), angles.sin())
    except Exception:  # a stranger's code may ask for a GPU
        return False
    ours = rotary(q, k, angles.cos(), angles.sin(), backend="reference")
    return all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(theirs, ours, strict=True))
