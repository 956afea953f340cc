"""RMSNorm modules that run our operation.

The operation can take in the addition before a norm too, which no model swapped here does: transformers adds in the
forward method of each family's decoder layer, between modules, half of the additions even a layer before their norm. A
swap of modules cannot reach there, and a copy of that method for every family would have to follow each release. A CPU
loses nothing by it, where the addition is a pass of its own in our operation too; a GPU reads the sum once more.
"""

from __future__ import annotations

import copy
from functools import cache

import torch
from torch import Tensor, nn

from ..kernels import rms_norm
from .swapping import Acceleration, is_replaced, stock_class, subclass, swap


def fuse_norms(model: nn.Module, report: Acceleration) -> None:
    """Swap every module called RMSNorm that computes one."""
    for module in [m for m in model.modules() if stock_class(m).__name__.endswith("RMSNorm")]:
        form = None if is_replaced(module) else _form(module)
        if is_replaced(module):
            report.left[stock_class(module).__name__] = "its forward method was replaced on the instance"
        elif form is None:
            report.left[stock_class(module).__name__] = "it computes something else than x / rms(x) * weight"
        else:
            swap(module, with_our_norm, owner=report.owner, _eps_and_offset=form)
            report.count("norm")


@cache
def with_our_norm(stock: type[nn.Module]) -> type[nn.Module]:
    """The same class, which computes in one operation, for training and for use."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        if x.dtype != self.weight.dtype:  # which of the two the result has depends on the class
            return stock.forward(self, x)
        eps, offset = self._eps_and_offset
        return rms_norm(x, self.weight, eps, offset=offset)

    return subclass(stock, forward)


@torch.no_grad()
def _form(module: nn.Module) -> tuple[float, float] | None:
    """(eps, offset) with which `rms_norm` computes what this module does; None if it computes something else.

    Its code runs on a weight and rows of our own: the model's may be anywhere, in any dtype, or not there yet.
    """
    eps = next((getattr(module, name) for name in ("variance_epsilon", "eps") if hasattr(module, name)), None)
    weight = getattr(module, "weight", None)
    if eps is None or weight is None or weight.ndim != 1:
        return None
    width = weight.shape[0] or 8  # a sharded weight may be a placeholder of no element
    x, known = (torch.linspace(low, low + 4, width, dtype=torch.float32, device="cpu") for low in (-2, -1))
    tried = copy.copy(module)
    tried._parameters = {**module._parameters, "weight": nn.Parameter(known)}
    try:
        result = stock_class(module).forward(tried, x[None])
    except Exception:  # a stranger's code may ask for more than rows, or for a GPU
        return None
    for offset in (0.0, 1.0):
        expected = rms_norm(x[None], known, eps, offset=offset, backend="reference")
        if result.shape == expected.shape and torch.allclose(result, expected, rtol=1e-5):
            return eps, offset
    return None
