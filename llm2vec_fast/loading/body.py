"""The model that `AutoModel` loads, found inside the one with an output layer: adapters are written for it."""

from __future__ import annotations

from torch import nn


def body_of(model: nn.Module) -> nn.Module:
    """What ``AutoModel`` loads of a model, which may have a head and be inside a peft model; else the model itself."""
    base = unwrapped(model)
    return getattr(base, "base_model", base)


def body_prefix(model: nn.Module) -> str:
    """What stands before the names of its body's layers in the names of a model's, as "model." or "gpt_neox."."""
    body = body_of(model)
    return next(
        f"{plain_name(name)}." if name else "" for name, module in unwrapped(model).named_modules() if module is body
    )


def plain_name(name: str) -> str:
    """A module's or a weight's name without the wrappers of compilation, sharding and checkpointing, as "_orig_mod"."""
    return ".".join(part for part in name.split(".") if not part.startswith("_"))


def unwrapped(model: nn.Module) -> nn.Module:
    """The transformers model inside a peft model."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
