"""A model that is changed gets a configuration of its own, for another model may have been built from the same object.

Two towers, a teacher and its student, or a model that is yet to be built: what their configuration says of direction
and attention is theirs. All that belong to the changed decoder go on sharing one object: its layers, and the models
around it (a head, a peft model), so that each of them saves what the decoder does.
"""

from __future__ import annotations

import copy
import gc
import sys
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

Held = list[tuple[dict[str, Any], str, PreTrainedConfig]]  # attributes of a module, a name in it, what it was


def take_own_config(model: nn.Module, decoder: PreTrainedModel) -> Held:
    """Let ``decoder``, within ``model``, and all that belong to it hold copies of their configurations.

    Returns:
        What was there before, for `give_back_config`.
    """
    tops = [model, *_models_around(model, decoder)]
    copies: dict[int, Any] = {}
    for holder in (*tops, decoder):
        copy.deepcopy(vars(holder).get("config"), copies)
    held = [
        (vars(module), name, value)
        for top in tops
        for module in _own_modules(top, decoder)
        for name, value in vars(module).items()
        if id(value) in copies and isinstance(value, PreTrainedConfig)
    ]
    for attributes, name, value in held:
        attributes[name] = copies[id(value)]
    return held


def give_back_config(held: Held) -> None:
    """Undo `take_own_config`."""
    for attributes, name, value in held:
        attributes[name] = value


def _own_modules(top: nn.Module, decoder: PreTrainedModel) -> Iterator[nn.Module]:
    """``top`` and what is in it, but for other models that were built from the decoder's configuration."""
    yield top
    for child in top.children():
        if not _is_another(child, decoder):
            yield from _own_modules(child, decoder)


def _is_another(module: nn.Module, decoder: PreTrainedModel) -> bool:
    if not isinstance(module, PreTrainedModel) or module.config is not decoder.config:
        return False
    return all(decoder is not m for m in module.modules()) and all(module is not m for m in decoder.modules())


def _models_around(model: nn.Module, decoder: PreTrainedModel) -> list[nn.Module]:
    """Models that ``decoder`` is a part of and ``model`` is not all of: ``lm`` where ``lm.model`` was given.

    A module does not know what it is a part of, so the garbage collector's list is searched, if anything at all holds
    the configuration besides the modules of ``model``.
    """
    within = sum(x is decoder.config for module in model.modules() for x in vars(module).values())
    if _references(vars(decoder), "config") == within:
        return []
    if frozen := gc.get_freeze_count():
        gc.unfreeze()  # frozen objects are not listed
    try:
        return [x for x in gc.get_objects() if issubclass(type(x), nn.Module) and _is_around(x, model, decoder)]
    finally:
        if frozen:
            gc.collect()  # what nobody holds would stay for good
            gc.freeze()


def _references(attributes: dict[str, Any], name: str) -> int:
    """How often an attribute's value is held, wherever that is."""
    plain = {name: object()}
    return sys.getrefcount(attributes[name]) - sys.getrefcount(plain[name]) + 1


def _is_around(module: nn.Module, model: nn.Module, decoder: PreTrainedModel) -> bool:
    config = vars(module).get("config")
    if not isinstance(config, PreTrainedConfig) or not _has(config, decoder.config):
        return False
    parts = list(module.modules())
    return any(x is decoder for x in parts) and not any(_is_another(x, decoder) for x in parts)


def _has(config: PreTrainedConfig, part: PreTrainedConfig) -> bool:
    """Whether ``part`` is this configuration or one in it, as text_config is."""
    inner = (getattr(config, name, None) for name in config.sub_configs)
    return config is part or any(_has(x, part) for x in inner if isinstance(x, PreTrainedConfig))
