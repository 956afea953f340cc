"""A module changes its class, on the instance, and back; and the report of what did and what did not.

A swapped module keeps its parameters, its state dict, its hooks and its place in the model. Copies and pickles keep the
swap: classes made at run time are made again where they are needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import FunctionType

from torch import nn

_STOCK, _ADDED = "_stock_class", "_added_state"


@dataclass
class Acceleration:
    """What `accelerate` swapped, counted by part, and what it left alone, with the reason."""

    swapped: dict[str, int] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def count(self, part: str) -> None:
        """One more module of this part is swapped."""
        self.swapped[part] = self.swapped.get(part, 0) + 1

    def __str__(self) -> str:
        swapped = ", ".join(f"{count} {part}" for part, count in self.swapped.items()) or "nothing"
        left = "; ".join(f"{part}: {reason}" for part, reason in self.left.items()) or "nothing"
        return f"swapped {swapped}; left {left}"


def swap(module: nn.Module, swapped: type[nn.Module], **state: object) -> None:
    """Make ``module`` an instance of ``swapped``; ``state`` becomes attributes that go again with `unswap`."""
    module.__dict__.update({_STOCK: type(module), _ADDED: tuple(state), **state})
    module.__class__ = swapped


def unswap(module: nn.Module) -> None:
    """Undo `swap`, where it was done."""
    if _STOCK in module.__dict__:
        module.__class__ = module.__dict__.pop(_STOCK)
        for name in module.__dict__.pop(_ADDED):
            module.__dict__.pop(name, None)


def is_replaced(module: nn.Module) -> bool:
    """True where somebody put a forward method on the instance: the class's would never run."""
    return "forward" in module.__dict__


def subclass(stock: type[nn.Module], forward: FunctionType, make: Callable[[type], type]) -> type[nn.Module]:
    """``stock`` with another forward method, under its own name; ``make(stock)`` is what makes it again."""

    def reduce(module: nn.Module) -> tuple:
        return _new, (make, module.__dict__[_STOCK]), module.__dict__

    names = {"forward": forward, "__reduce__": reduce, "__module__": stock.__module__, "__doc__": stock.__doc__}
    return type(stock.__name__, (stock,), names)


def _new(make: Callable[[type], type], stock: type[nn.Module]) -> nn.Module:
    swapped = make(stock)
    return swapped.__new__(swapped)
