"""A model of 16-bit weights that computes in float32 without a float32 copy: a weight is converted as it is read.

Texts whose activations leave the range of 16 bits are few, and their results must not cost the memory of a second
model, nor depend on how much is free.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .replica import Replica

NARROW = (torch.bfloat16, torch.float16)


def in_float32(source: nn.Module) -> nn.Module:
    """The model's modules once more, in evaluation mode, computing in float32 on the same weights.

    Weights in a form of their own (quantised, in whatever way) stay in it.
    """
    replica = Replica(source, accelerated=False)
    for module in replica.twins:
        module.__dict__["_parameters"] = _ConvertedWhenRead(module._parameters)
        module.__dict__["_buffers"] = _ConvertedWhenRead(module._buffers)
        if isinstance(module, nn.Embedding) and "forward" not in module.__dict__:
            module.__dict__["forward"] = partial(_embed, module)
    return replica.model


class _ConvertedWhenRead(dict):
    """Parameters or buffers of a module, as its code reads them."""

    def __getitem__(self, name: str) -> Any:
        return _wide(super().__getitem__(name))


def _wide(tensor: Any) -> Any:
    return tensor.detach().float() if _is_plain(tensor) else tensor


def _is_plain(tensor: Any) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.dtype in NARROW


def _embed(module: nn.Embedding, input: Tensor) -> Tensor:
    """What the module does, with the rows in use alone converted: the whole may be gigabytes."""
    weight = dict.__getitem__(module._parameters, "weight")
    if not _is_plain(weight):
        return type(module).forward(module, input)
    used, places = input.unique(return_inverse=True)
    small = copy.copy(module)
    del small.__dict__["forward"]
    small.__dict__["_parameters"] = {"weight": _wide(weight[used].detach())}
    small.padding_idx = small.max_norm = None
    return type(module).forward(small, places)
