"""RMSNorm modules that run our operation.

The operation can take in the addition before a norm too, which no model swapped here does: transformers adds in the
forward method of each family's decoder layer, between modules, half of the additions even a layer before their norm. A
swap of modules cannot reach there, and a copy of that method for every family would have to follow each release. A CPU
loses nothing by it, where the addition is a pass of its own in our operation too; a GPU reads the sum once more.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ..kernels import rms_norm
from .swapping import Acceleration, is_replaced, stock_class, swap


class FusedRMSNorm(nn.Module):
    """A stock RMSNorm in one operation, for training and for use."""

    _norm: tuple[float, float]

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != self.weight.dtype:  # which of the two the result has depends on the module
            return stock_class(self).forward(self, x)
        eps, offset = self._norm
        return rms_norm(x, self.weight, eps, offset=offset)


def fuse_norms(model: nn.Module, report: Acceleration) -> None:
    """Swap every module called RMSNorm that computes one."""
    for module in [m for m in model.modules() if stock_class(m).__name__.endswith("RMSNorm")]:
        form = None if is_replaced(module) else _form(module)
        if form is None:
            report.left[stock_class(module).__name__] = "it computes something else than x / rms(x) * weight"
        else:
            swap(module, FusedRMSNorm, owner=report.owner, _norm=form)
            report.count("norm")


@torch.no_grad()
def _form(module: nn.Module) -> tuple[float, float] | None:
    """(eps, offset) with which `rms_norm` computes what this module does; None if it computes something else."""
    eps = next((getattr(module, name) for name in ("variance_epsilon", "eps") if hasattr(module, name)), None)
    weight = getattr(module, "weight", None)
    if eps is None or weight is None or weight.ndim != 1:
        return None
    wide = copy.deepcopy(module).float()
    x = torch.linspace(-2, 3, weight.shape[0], dtype=torch.float32, device=weight.device)[None]
    for offset in (0.0, 1.0):
        if torch.allclose(
            stock_class(wide).forward(wide, x),
            rms_norm(x, wide.weight, eps, offset=offset, backend="reference"),
            rtol=1e-5,
        ):
            return eps, offset
    return None
