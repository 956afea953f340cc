"""A module changes its class, on the instance, and back; and the report of what did and what did not.

A swap has an owner ("acceleration", "training", …). Owners do not know of each other: a module holds the swaps of all,
its class is its stock class with these applied in order, and one owner taking its own away leaves the others' in place.
A swapped module keeps its parameters, its state dict, its hooks and its place in the model. Copies and pickles keep the
swaps: classes made at run time are made again where they are needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import FunctionType

from torch import nn

ACCELERATION = "acceleration"  # the owner of what `accelerate` swaps unless told otherwise
Make = Callable[[type[nn.Module]], type[nn.Module]]
_STOCK, _SWAPS = "_stock_class", "_swaps"


@dataclass
class Acceleration:
    """What `accelerate` swapped, counted by part, and what it left alone, with the reason."""

    swapped: dict[str, int] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    owner: str = ACCELERATION

    def count(self, part: str) -> None:
        """One more module of this part is swapped."""
        self.swapped[part] = self.swapped.get(part, 0) + 1

    def __str__(self) -> str:
        swapped = ", ".join(f"{count} {part}" for part, count in self.swapped.items()) or "nothing"
        left = "; ".join(f"{part}: {reason}" for part, reason in self.left.items()) or "nothing"
        return f"swapped {swapped}; left {left}"


@dataclass(frozen=True)
class _Swap:
    """``make`` is a class that replaces any, or makes one from a class."""

    owner: str
    make: Make | type[nn.Module]
    state: dict[str, object]


def swap(module: nn.Module, make: Make | type[nn.Module], *, owner: str, **state: object) -> None:
    """Let ``module`` be of the class ``make``, or of what ``make`` makes of its class, until the owner's `unswap`.

    Done again by the same owner it changes nothing but ``state``: attributes of the module that go with the swap.
    """
    module.__dict__.setdefault(_STOCK, type(module))
    before = module.__dict__.get(_SWAPS, ())
    _set(module, (*(s for s in before if (s.owner, s.make) != (owner, make)), _Swap(owner, make, state)))


def unswap(module: nn.Module, owner: str) -> None:
    """Undo what this owner swapped, and nothing else."""
    swaps = module.__dict__.get(_SWAPS, ())
    kept = tuple(s for s in swaps if s.owner != owner)
    if len(kept) < len(swaps):
        _set(module, kept)


def stock_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module has without any swap."""
    return module.__dict__.get(_STOCK, type(module))


def is_replaced(module: nn.Module) -> bool:
    """True where somebody put a forward method on the instance: the class's would never run."""
    return "forward" in module.__dict__


def subclass(stock: type[nn.Module], forward: FunctionType) -> type[nn.Module]:
    """``stock`` with another forward method, under its own name, for what a swap makes."""

    def reduce(module: nn.Module) -> tuple:
        makes = tuple(s.make for s in module.__dict__[_SWAPS])
        return _new, (module.__dict__[_STOCK], makes), module.__dict__

    names = {"forward": forward, "__reduce__": reduce, "__module__": stock.__module__, "__doc__": stock.__doc__}
    return type(stock.__name__, (stock,), names)


def _set(module: nn.Module, swaps: tuple[_Swap, ...]) -> None:
    stale = {name for s in module.__dict__.get(_SWAPS, ()) for name in s.state}
    fresh = {name: value for s in swaps for name, value in s.state.items()}
    module.__dict__.update(fresh)  # before the class: a call in another thread may need it
    module.__class__ = _class_of(module.__dict__[_STOCK], tuple(s.make for s in swaps))
    for name in stale - set(fresh):
        module.__dict__.pop(name, None)
    if swaps:
        module.__dict__[_SWAPS] = swaps
    else:
        del module.__dict__[_SWAPS], module.__dict__[_STOCK]


def _class_of(stock: type[nn.Module], makes: tuple[Make | type[nn.Module], ...]) -> type[nn.Module]:
    for make in dict.fromkeys(makes):
        stock = make if isinstance(make, type) else make(stock)
    return stock


def _new(stock: type[nn.Module], makes: tuple[Make | type[nn.Module], ...]) -> nn.Module:
    swapped = _class_of(stock, makes)
    return swapped.__new__(swapped)
