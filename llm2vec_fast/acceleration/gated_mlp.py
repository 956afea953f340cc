"""Gated MLPs: the activation and the gate in one operation, or inside the products where weights are packed."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from ..kernels import swiglu
from ..kernels.linear import ACTIVATIONS
from ..kernels.swiglu import ACTIVATIONS as FUSED_ACTIVATIONS
from .linear import PackedLinear
from .swapping import Acceleration, is_replaced, stock_class, swap


class FusedGatedMLP(nn.Module):
    """down(act(gate(x)) · up(x)), as Llama, Mistral, Qwen and Gemma have it."""

    _activation: str

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj, self.up_proj
        if all(isinstance(m, PackedLinear) and m.runs_packed(x) for m in (gate, up)):
            return self.down_proj(up(x, multiplier=gate(x, activation=self._activation)))
        return self.down_proj(_gated(gate(x), up(x), self._activation))


class FusedJointGatedMLP(nn.Module):
    """The same where one projection makes both, as in Phi-3."""

    _activation: str

    def forward(self, hidden_states: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
        return self.down_proj(_gated(gate, up, self._activation))


_SEPARATE, _JOINT = {"gate_proj", "up_proj", "down_proj", "act_fn"}, {"gate_up_proj", "down_proj", "activation_fn"}


def fuse_gated_mlps(model: nn.Module, report: Acceleration) -> None:
    """Swap every module that computes a gated MLP, as found by running its code on known parts."""
    for module in list(model.modules()):
        parts = {name for name, _ in module.named_children()}
        if parts not in (_SEPARATE, _JOINT):
            continue
        name, act_fn = stock_class(module).__name__, module.act_fn if parts == _SEPARATE else module.activation_fn
        activation = _activation_name(act_fn)
        if activation is None:
            report.left[name] = f"its activation {type(act_fn).__name__} has no fused form"
        elif is_replaced(module):
            report.left[name] = "its forward method was replaced on the instance"
        elif not _computes_gated_mlp(stock_class(module), act_fn, activation):
            report.left[name] = "it computes something else than down(act(gate(x)) * up(x))"
        else:
            fused = FusedGatedMLP if parts == _SEPARATE else FusedJointGatedMLP
            swap(module, fused, owner=report.owner, _activation=activation)
            report.count("swiglu")


def _gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    if activation in FUSED_ACTIVATIONS and gate.dtype == up.dtype:
        return swiglu(gate, up, activation)
    return ACTIVATIONS[activation](gate) * up


@torch.no_grad()
def _computes_gated_mlp(stock: type[nn.Module], act_fn: nn.Module, activation: str) -> bool:
    """Names do not say what a module computes: run its code with projections whose results are known."""
    x = torch.linspace(-1, 1, 8, dtype=torch.float64, device="cpu")[None]
    gate, up = 2 * x + 0.25, 0.5 - x
    parts = SimpleNamespace(
        gate_proj=lambda _: gate, up_proj=lambda _: up, down_proj=lambda h: 3 * h, act_fn=act_fn,
        gate_up_proj=lambda _: torch.cat([gate, up], -1), activation_fn=act_fn,
    )  # fmt: skip
    try:
        result = stock.forward(parts, x)
    except Exception:
        return False
    expected = 3 * (ACTIVATIONS[activation](gate) * up)
    return isinstance(result, Tensor) and torch.allclose(result, expected, rtol=1e-12)


@torch.no_grad()
def _activation_name(act_fn: nn.Module) -> str | None:
    """Which of our activations a transformers activation module is; found by value, since its classes vary."""
    x = torch.linspace(-4, 4, 33, dtype=torch.float64, device="cpu")
    try:
        result = act_fn(x)
    except Exception:  # a stranger's code may have parameters, or ask for a GPU
        return None
    return next((name for name, f in ACTIVATIONS.items() if torch.allclose(result, f(x), rtol=0, atol=1e-12)), None)
