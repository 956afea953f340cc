"""LoRA layers of peft: the frozen product and the adapter in one, and little kept for the backward pass."""

from __future__ import annotations

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from ..kernels.lora import lora_linear
from .linear import PackedLinear
from .swapping import Acceleration, is_replaced, stock_class, swap

_PLAIN_LINEAR = (nn.Linear, PackedLinear)


class LeanLoraLinear(LoraLinear):
    """Runs our operation where one plain adapter lies on a frozen layer, and peft's own code anywhere else.

    Which of the two runs does not depend on whether a graph is kept: they draw other dropout masks, and what GradCache
    or reentrant checkpointing runs without a graph first must drop what the pass for its gradient drops.
    """

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        name = self._only_adapter()
        if args or kwargs or name is None or torch.is_autocast_enabled(x.device.type):
            return super().forward(x, *args, **kwargs)
        base, dropout = self.base_layer, self.lora_dropout[name]
        down, up = self.lora_A[name].weight, self.lora_B[name].weight
        share = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        return lora_linear(x, base.weight, base.bias, down, up, self.scaling[name], share)

    def _only_adapter(self) -> str | None:
        """The adapter, if there is one active, of the plain kind, on a plain frozen layer, with nothing hooked in."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if len(active) != 1 or self.disable_adapters or self.merged or active[0] in self.lora_variant:
            return None
        (name,), base = active, self.base_layer
        down, up, dropout = self.lora_A[name], self.lora_B[name], self.lora_dropout[name]
        plain = all(type(part) in _PLAIN_LINEAR for part in (base, down, up)) and up.bias is None
        plain = plain and type(dropout) in (nn.Dropout, nn.Identity) and getattr(dropout, "p", 0.0) < 1
        frozen = not base.weight.requires_grad and (base.bias is None or not base.bias.requires_grad)
        return name if plain and frozen and not any(map(_is_hooked, (base, down, up, dropout))) else None


def fuse_lora(model: nn.Module, report: Acceleration) -> None:
    """Swap every LoRA layer of a linear one."""
    for module in model.modules():
        if stock_class(module) is LoraLinear and not is_replaced(module):
            swap(module, LeanLoraLinear, owner=report.owner)
            report.count("lora")


def _is_hooked(module: nn.Module) -> bool:
    forward, backward = module._forward_hooks or module._forward_pre_hooks, module._backward_hooks
    return bool(forward or backward or module._backward_pre_hooks or is_replaced(module))
