"""Linear layers that run on packed weights, for inference on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..kernels.linear import linear, packing_problem
from ..memory import total_memory
from .packing import Pack
from .swapping import Acceleration, is_replaced, stock_class, swap

_PACK = "_packed"


class PackedLinear(nn.Linear):
    """A linear layer that runs on a packed copy of its weight, in evaluation mode and where no gradient is needed."""

    _packed: Pack

    def forward(self, x: Tensor, activation: str | None = None, multiplier: Tensor | None = None) -> Tensor:
        packed = self._packed.of(self.weight) if self.runs_packed(x) else None
        weight = self.weight if packed is None else packed
        return linear(x, weight, self.bias, activation=activation, multiplier=multiplier)

    def runs_packed(self, x: Tensor) -> bool:
        """Whether this input runs on the packed weight."""
        # In training weights change at every step, and reentrant checkpointing runs a first pass without gradients.
        if torch.is_grad_enabled() or self.training:
            return False
        weight = self.weight  # which may have moved since
        return weight.is_cpu and x.dtype == weight.dtype == torch.bfloat16


def pack_linears(model: nn.Module, report: Acceleration) -> None:
    """Swap every plain linear layer but the vocabulary projection."""
    heads = _output_layers(model)
    layers = [m for m in model.modules() if stock_class(m) is nn.Linear and id(m) not in heads and not is_replaced(m)]
    problem = _problem(layers)
    if problem is not None:
        report.left["linear"] = problem
        return
    for module in layers:
        swap(module, PackedLinear, owner=report.owner, **{_PACK: module.__dict__.get(_PACK) or Pack()})
        report.count("linear")


def _output_layers(model: nn.Module) -> set[int]:
    """Vocabulary projections: not part of an encoder's forward pass, and the largest weights of all."""
    return {id(m.get_output_embeddings()) for m in model.modules() if isinstance(m, PreTrainedModel)}


def _problem(layers: list[nn.Linear]) -> str | None:
    """Why the layers stay plain: for what they are and what the machine is, never for what else runs on it now, so that
    a model's results are the same each time."""
    if not layers:
        return "the model has no plain linear layers"
    problems = {packing_problem(m.weight) for m in layers} - {None}
    if problems:
        return sorted(problems)[0]
    need, memory = sum(m.weight.nbytes for m in layers), total_memory()
    if need > memory / 4:
        return f"a packed copy takes {need >> 20} MiB, more than a quarter of the {memory >> 20} MiB of memory"
    return None
