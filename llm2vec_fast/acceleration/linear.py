"""Linear layers that run on packed weights, for inference on a CPU."""

from __future__ import annotations

import psutil
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..kernels.linear import PackedWeight, linear, pack_weight, packing_problem
from ..memory import release_file_pages
from .swapping import Acceleration, is_replaced, swap


class PackedLinear(nn.Linear):
    """A linear layer that runs on a packed copy of its weight, in evaluation mode and where no gradient is needed."""

    _packed: tuple[PackedWeight, tuple[int, int]] | None

    def forward(self, x: Tensor, activation: str | None = None, multiplier: Tensor | None = None) -> Tensor:
        weight = self._current_pack() if self.runs_packed(x) else self.weight
        return linear(x, weight, self.bias, activation=activation, multiplier=multiplier)

    def runs_packed(self, x: Tensor) -> bool:
        """Whether this input runs on the packed weight."""
        # In training weights change at every step, and reentrant checkpointing runs a first pass without gradients.
        return not (torch.is_grad_enabled() or self.training) and x.dtype == self.weight.dtype

    def _current_pack(self) -> PackedWeight:
        """The packed weight, made at first use and again once the weight has been replaced or written to."""
        stamp = (self.weight.data_ptr(), 0 if self.weight.is_inference() else self.weight._version)
        if self._packed is None or self._packed[1] != stamp:
            self._packed = (pack_weight(self.weight), stamp)
            release_file_pages(self.weight)  # mapped by safetensors: seldom read from now on
        return self._packed[0]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_packed": None}  # a copy or a pickle packs anew: oneDNN's layout is this machine's


def pack_linears(model: nn.Module, report: Acceleration) -> None:
    """Swap every plain linear layer but the vocabulary projection."""
    heads = _output_layers(model)
    layers = [m for m in model.modules() if type(m) is nn.Linear and id(m) not in heads and not is_replaced(m)]
    problem = _problem(layers)
    if problem is not None:
        report.left["linear"] = problem
        return
    for module in layers:
        swap(module, PackedLinear, _packed=None)
        report.count("linear")


def _output_layers(model: nn.Module) -> set[int]:
    """Vocabulary projections: not part of an encoder's forward pass, and the largest weights of all."""
    return {id(m.get_output_embeddings()) for m in model.modules() if isinstance(m, PreTrainedModel)}


def _problem(layers: list[nn.Linear]) -> str | None:
    if not layers:
        return "the model has no plain linear layers"
    problems = {packing_problem(m.weight) for m in layers} - {None}
    if problems:
        return sorted(problems)[0]
    need, free = sum(m.weight.nbytes for m in layers), psutil.virtual_memory().available
    if need > free / 4:
        return f"a packed copy takes {need >> 20} MiB, more than a quarter of the {free >> 20} MiB that are free"
    return None
