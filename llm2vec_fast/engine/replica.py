"""A model's modules once more, for encoding alone: in evaluation mode, on fused operations, on the same weights.

So `encode` neither asks in which mode the model is nor changes it: a model in training goes on as if nothing had been,
whichever thread trains it, and any number of threads run the replica.
"""

from __future__ import annotations

from functools import partial
from operator import is_
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from ..acceleration import accelerate
from ..acceleration.linear import PackedLinear
from ..acceleration.swapping import swap
from ..errors import UserError

OWNER = "encoder"
_NOT_COMPARED = ("_modules", "training")


class Replica:
    """Modules that share weights and hooks with those of ``source``, and have classes and a mode of their own.

    Attributes:
        model: what to run.
        offloaded: whether weights are loaded for each layer's call and dropped behind it: one pass at a time, then.
        left: what was not accelerated, and why.

    Args:
        source: the model.
        accelerated: run fused operations.
        before: the replica that this one takes the place of; its packed weights are kept.

    Raises:
        UserError: weights have no values.
    """

    def __init__(self, source: nn.Module, accelerated: bool, before: Replica | None = None) -> None:
        self.accelerated = accelerated
        self._place = _place(source)
        self._shared: list[nn.Module] = []
        self._seen: list[_Seen] = []
        self._twins: dict[int, nn.Module] = {}
        self.model = self._twin(source)
        self._rebind()
        self.offloaded = any(weight.is_meta for weight in source.parameters())
        if self.offloaded and not any(hasattr(module, "_hf_hook") for module in source.modules()):
            raise UserError("the model's weights are on the meta device, which holds no values: load it on another one")
        self.left: dict[str, str] = {}
        if accelerated:
            self.left = accelerate(self.model, attention=False, loss=False, lora=False, owner=OWNER).left
            if before is not None:
                self._keep_packs(before)

    def is_current(self, source: nn.Module, accelerated: bool) -> bool:
        """Whether the model still is what was copied: the same modules with the same attributes. Values of weights need
        no look, they are shared."""
        if accelerated != self.accelerated or self._place != _place(source) or self._seen[0].module is not source:
            return False
        return all(map(_Seen.is_as_it_was, self._seen))

    @property
    def twins(self) -> list[nn.Module]:
        """The modules that are this replica's own."""
        return list(self._twins.values())

    def require_evaluation_mode(self) -> None:
        """Refuse to run what could not be copied and trains.

        Raises:
            UserError: it would compute with dropout.
        """
        for module in self._shared:
            if any(part.training for part in module.modules()):
                raise UserError(
                    f"{type(module).__name__} has a forward method of its own that cannot be run in evaluation mode "
                    "apart from the model, which is in training mode: call model.eval() before encode"
                )

    def _twin(self, source: nn.Module) -> nn.Module:
        if id(source) in self._twins:
            return self._twins[id(source)]
        attributes = {name: value for name, value in source.__dict__.items() if name not in _NOT_COMPARED}
        self._seen.append(_Seen(source, attributes))
        if isinstance(source, torch.jit.ScriptModule) or _is_closed(source.__dict__.get("forward")):
            self._shared.append(source)
            return source
        twin = object.__new__(type(source))
        twin.__dict__.update(attributes, training=False, _modules={}, _compiled_call_impl=None)
        self._twins[id(source)] = twin  # before its children, which may hold it
        for name, child in source._modules.items():
            twin._modules[name] = None if child is None else self._twin(child)
        return twin

    def _rebind(self) -> None:
        """Methods that lie on the instance, as accelerate's device maps put them, call the twin."""
        for twin in self._twins.values():
            for name, value in twin.__dict__.items():
                if isinstance(value, MethodType | partial):
                    twin.__dict__[name] = self._bound_here(value)

    def _bound_here(self, value: Any) -> Any:
        if isinstance(value, MethodType):
            owner = self._twins.get(id(value.__self__))
            return value if owner is None else MethodType(value.__func__, owner)
        if isinstance(value, partial):
            rebound = partial(
                self._bound_here(value.func),
                *map(self._bound_here, value.args),
                **{name: self._bound_here(x) for name, x in value.keywords.items()},
            )
            rebound.__dict__.update(value.__dict__)
            return rebound
        return self._twins.get(id(value), value)

    def _keep_packs(self, before: Replica) -> None:
        packs = {id(m.weight): m._packed for m in before.model.modules() if isinstance(m, PackedLinear)}
        for module in self.model.modules():
            if isinstance(module, PackedLinear) and id(module.weight) in packs:
                swap(module, PackedLinear, owner=OWNER, _packed=packs[id(module.weight)])


class _Seen:
    """A module as it was when it was copied."""

    def __init__(self, module: nn.Module, attributes: dict[str, Any]) -> None:
        self.module = module
        self._kind = type(module)
        self._children = tuple(module._modules.items())
        self._names, self._values = tuple(attributes), tuple(attributes.values())

    def is_as_it_was(self) -> bool:
        """Called for every module at every encode, so it must not take a microsecond more than it needs."""
        module, now = self.module, self.module.__dict__
        return (
            type(module) is self._kind
            and len(now) == len(self._names) + len(_NOT_COMPARED)
            and tuple(module._modules.items()) == self._children
            and (
                all(map(is_, map(now.get, self._names), self._values))
                or all(name in now and _same(now[name], x) for name, x in zip(self._names, self._values, strict=True))
            )
        )


def _is_closed(forward: Any) -> bool:
    """True of a plain function on the instance: whatever module it holds is the source's, which cannot be changed."""
    return isinstance(forward, FunctionType)


def _same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and isinstance(a, int | float | str | MethodType) and a == b)


def _place(source: nn.Module) -> tuple:
    """Where weights lie and in what dtype: which operations are fused depends on it."""
    weight = next(source.parameters(), None)
    return () if weight is None else (weight.device, weight.dtype)
