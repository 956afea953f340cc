"""Swap parts of a Hugging Face model for faster ones, on the instance, and back.

For inference on a CPU: linear layers run on packed weights, gated MLPs (Llama's, Gemma's and their like) fold their
activation and their gate into the products, RMSNorm and the rotary embedding pass over memory half as often. A swapped
module keeps its parameters, its state dict and its place; only its class changes, so that copies, pickles and adapters
go on working. What a module computes is compared with our formula first: names alone are not trusted. Whenever a
gradient is needed, or a part was wrapped by an adapter, the stock computation runs.
"""

from __future__ import annotations

import copy
import inspect
import logging
from dataclasses import dataclass, field
from functools import cache
from types import FunctionType

import psutil
import torch
from torch import Tensor, nn

from .kernels import rms_norm, rotary
from .kernels.linear import ACTIVATIONS, PackedWeight, linear, pack_weight, packing_problem
from .memory import release_file_pages

logger = logging.getLogger(__name__)

_GATED_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_ROTARY_NAME = "apply_rotary_pos_emb"  # how transformers' modelling files call it, all of them
_STATE = ("_stock_class", "_packed", "_activation", "_norm")


@dataclass
class Acceleration:
    """What `accelerate` swapped, counted by part, and what it left alone, with the reason."""

    swapped: dict[str, int] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def count(self, part: str) -> None:
        self.swapped[part] = self.swapped.get(part, 0) + 1


class PackedLinear(nn.Linear):
    """A linear layer that runs on a packed copy of its weight where no gradient is needed."""

    _packed: tuple[PackedWeight, tuple[int, int]] | None

    def forward(self, x: Tensor, activation: str | None = None, multiplier: Tensor | None = None) -> Tensor:
        if torch.is_grad_enabled() or x.dtype != self.weight.dtype:
            return linear(x, self.weight, self.bias, activation=activation, multiplier=multiplier)
        return linear(x, self._current_pack(), self.bias, activation=activation, multiplier=multiplier)

    def _current_pack(self) -> PackedWeight:
        """The packed weight, made at first use and again once the weight has been replaced or written to."""
        stamp = (self.weight.data_ptr(), 0 if self.weight.is_inference() else self.weight._version)
        if self._packed is None or self._packed[1] != stamp:
            self._packed = (pack_weight(self.weight), stamp)
            release_file_pages(self.weight)  # mapped by safetensors: seldom read from now on
        return self._packed[0]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_packed": None}  # a copy or a pickle packs anew: oneDNN's layout is this machine's


class FusedGatedMLP(nn.Module):
    """down(act(gate(x)) · up(x)), the activation and the gate applied inside the products."""

    _activation: str

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj, self.up_proj
        if torch.is_grad_enabled() or not (isinstance(gate, PackedLinear) and isinstance(up, PackedLinear)):
            return self._stock_class.forward(self, x)
        return self.down_proj(up(x, multiplier=gate(x, activation=self._activation)))


class FusedRMSNorm(nn.Module):
    """A stock RMSNorm, in fewer passes where no gradient is needed."""

    _norm: tuple[float, float]

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return self._stock_class.forward(self, x)
        eps, offset = self._norm
        return rms_norm(x, self.weight, eps, offset=offset)


def accelerate(model: nn.Module) -> Acceleration:
    """Make a model's forward pass without gradients faster, in place; `restore` undoes it.

    Packed weights are copies: they take the memory of the layers' weights once more, unless those lie in a file that
    can be read again, and are left out where they would exceed a quarter of the memory that is free. After writing to a
    weight through ``.data``, call this again.

    Args:
        model: a transformers model, bare or inside a peft model; on other devices than the CPU it is left as it is.

    Returns:
        What was swapped, and what was left alone and why; the same is logged.
    """
    restore(model)
    report = Acceleration()
    devices = {p.device.type for p in model.parameters()}
    if devices == {"cpu"}:
        _pack_linears(model, report)
        _fuse_gated_mlps(model, report)
        _fuse_norms(model, report)
        _fuse_rotary(model, report)
    else:
        report.left["model"] = f"parts are swapped on a CPU only, it is on {', '.join(sorted(devices))}"
    logger.info("accelerated %s: swapped %s, left %s", type(model).__name__, report.swapped, report.left)
    return report


def restore(model: nn.Module) -> None:
    """Undo `accelerate`: every module is of its stock class again, and the packed weights are freed."""
    for module in model.modules():
        if "_stock_class" in module.__dict__:
            module.__class__ = module._stock_class
            for name in _STATE:
                module.__dict__.pop(name, None)


def _swap(module: nn.Module, swapped: type[nn.Module]) -> None:
    module._stock_class = type(module)
    module.__class__ = swapped


def _pack_linears(model: nn.Module, report: Acceleration) -> None:
    layers = [m for m in model.modules() if type(m) is nn.Linear and m is not _output_layer(model)]
    problem = _packing_problem(layers)
    if problem is not None:
        report.left["linear"] = problem
        return
    for module in layers:
        _swap(module, PackedLinear)
        module._packed = None
        report.count("linear")


def _fuse_gated_mlps(model: nn.Module, report: Acceleration) -> None:
    if "linear" in report.left:
        report.left["gated_mlp"] = "it needs packed linear layers"
        return
    for module in [m for m in model.modules() if {name for name, _ in m.named_children()} == _GATED_PARTS]:
        name = type(module).__name__
        activation = _activation_name(module.act_fn)
        if activation is None:
            report.left[name] = f"its activation {type(module.act_fn).__name__} has no fused form"
        elif not _computes_gated_mlp(module):
            report.left[name] = "it computes something else than down(act(gate(x)) * up(x))"
        else:
            _swap(module, FusedGatedMLP)
            module._activation = activation
            report.count("gated_mlp")


def _fuse_norms(model: nn.Module, report: Acceleration) -> None:
    for module in [m for m in model.modules() if type(m).__name__.endswith("RMSNorm")]:
        form = _norm_form(module)
        if form is None:
            report.left[type(module).__name__] = "it computes something else than x / rms(x) * weight"
        else:
            _swap(module, FusedRMSNorm)
            module._norm = form
            report.count("rms_norm")


def _fuse_rotary(model: nn.Module, report: Acceleration) -> None:
    for module in list(model.modules()):
        forward = inspect.unwrap(type(module).forward)
        if _ROTARY_NAME not in getattr(getattr(forward, "__code__", None), "co_names", ()):
            continue
        if not _turns_halves(forward.__globals__[_ROTARY_NAME]):
            report.left[type(module).__name__] = "its rotary embedding pairs columns in another way"
            continue
        _swap(module, _with_our_rotary(type(module)))
        report.count("rotary")


@cache
def _with_our_rotary(stock: type[nn.Module]) -> type[nn.Module]:
    """The same class, whose forward finds our rotary embedding under the name it calls: the stock code, not a copy."""
    forward = inspect.unwrap(stock.forward)
    names = {**forward.__globals__, _ROTARY_NAME: rotary}
    ours = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    ours.__kwdefaults__ = forward.__kwdefaults__
    return type(stock.__name__, (stock,), {"forward": ours, "__reduce__": _reduce_with_our_rotary})


def _reduce_with_our_rotary(module: nn.Module) -> tuple:
    """Pickles and copies: the class is made again where it is needed."""
    return _new_with_our_rotary, (module._stock_class,), module.__dict__


def _new_with_our_rotary(stock: type[nn.Module]) -> nn.Module:
    swapped = _with_our_rotary(stock)
    return swapped.__new__(swapped)


@torch.no_grad()
def _turns_halves(function: FunctionType) -> bool:
    q, k = torch.linspace(-1, 1, 32, dtype=torch.float64).view(2, 1, 2, 2, 4)
    angles = torch.tensor([[[0.1, 0.7, 0.1, 0.7], [0.4, 1.9, 0.4, 1.9]]], dtype=torch.float64)
    try:
        theirs = function(q, k, angles.cos(), angles.sin())
    except (TypeError, RuntimeError, ValueError):
        return False
    return all(
        torch.allclose(a, b, rtol=1e-12) for a, b in zip(theirs, rotary(q, k, angles.cos(), angles.sin()), strict=True)
    )


@torch.no_grad()
def _norm_form(module: nn.Module) -> tuple[float, float] | None:
    """(eps, offset) with which `rms_norm` computes what this module does; None if it computes something else."""
    eps = next((getattr(module, name) for name in ("variance_epsilon", "eps") if hasattr(module, name)), None)
    weight = getattr(module, "weight", None)
    if eps is None or weight is None or weight.ndim != 1:
        return None
    wide = copy.deepcopy(module).float()
    x = torch.linspace(-2, 3, weight.shape[0])[None]
    for offset in (0.0, 1.0):
        if torch.allclose(wide(x), rms_norm(x, wide.weight, eps, offset=offset), rtol=1e-5):
            return eps, offset
    return None


@torch.no_grad()
def _computes_gated_mlp(module: nn.Module) -> bool:
    """A module's names do not say what it computes: compare it with the formula on one row."""
    x = torch.linspace(-1, 1, module.gate_proj.in_features, dtype=module.gate_proj.weight.dtype)[None]
    expected = module.down_proj(module.act_fn(module.gate_proj(x)) * module.up_proj(x))
    return torch.equal(module(x), expected)


def _activation_name(act_fn: nn.Module) -> str | None:
    """Which of our activations a transformers activation module is; found by value, since its classes vary."""
    x = torch.linspace(-4, 4, 33, dtype=torch.float64)
    return next((name for name, f in ACTIVATIONS.items() if torch.allclose(act_fn(x), f(x), rtol=0, atol=1e-12)), None)


def _output_layer(model: nn.Module) -> nn.Module | None:
    """The vocabulary projection: not part of an encoder's forward pass, and the largest weight of all."""
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def _packing_problem(layers: list[nn.Linear]) -> str | None:
    if not layers:
        return "the model has no plain linear layers"
    problems = {packing_problem(m.weight) for m in layers} - {None}
    if problems:
        return sorted(problems)[0]
    need, free = sum(m.weight.nbytes for m in layers), psutil.virtual_memory().available
    if need > free / 4:
        return f"a packed copy takes {need >> 20} MiB, more than a quarter of the {free >> 20} MiB that are free"
    return None
