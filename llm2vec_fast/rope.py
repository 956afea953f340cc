"""Rotary frequencies that follow a text's own length, whatever is packed or padded beside it.

Two of transformers' rope types, longrope (Phi-3) and dynamic NTK, choose their frequencies by the length of a text.
Stock code takes the largest position of the whole batch for it and writes the choice into the module, where it stays
for later calls and other threads. Here a hook behind the module computes each text by frequencies of its own. It calls
copies of the stock module whose frequencies never change, so that all a family does with them is the family's own code.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .errors import UnsupportedModelError
from .kernels.layout import SequenceLayout

_SHORT, _LONG = "short_texts", "long_texts"  # submodules of a rotary embedding; they hold no saved tensor
_STOCK = "_rope_type_of_stock"
_FIXED = "fixed"  # a rope type that stock code never recomputes
_ARGUMENTS = ("x", "position_ids", "layer_type")
Rotated = Tensor | tuple[Tensor, ...]  # cos and sin, or one complex tensor


def rope_by_own_length(decoder: nn.Module) -> bool:
    """Let every rotary embedding that depends on length take each text's own; others stay untouched. Idempotent.

    Returns:
        Whether there is one.

    Raises:
        UnsupportedModelError: one is not built as transformers builds them.
    """
    modules = _rotary_embeddings(decoder)
    for module in modules:
        if _STOCK in module.__dict__ or not any(map(_by_length, _rope_types(module).values())):
            continue
        try:
            short, long = _parts(module)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UnsupportedModelError(
                f"{type(module).__name__} has the rope type {module.rope_type!r} and is not built as transformers "
                f"builds it ({type(error).__name__}: {error}): change rope_parameters in its config.json"
            ) from error
        setattr(module, _STOCK, module.rope_type)
        module.rope_type = short.rope_type  # what stock code computes is not used, and must not be kept either
        module.add_module(_SHORT, short)
        module.add_module(_LONG, long)
        module.register_forward_hook(_by_own_length, with_kwargs=True)
    return any(_STOCK in module.__dict__ for module in modules)


def _parts(module: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Two copies: one for texts within the model's original context, one for longer ones."""
    short = _fixed(module)
    long = copy.deepcopy(short)
    for layer_type, rope_type in _rope_types(module).items():
        if rope_type == "longrope":
            _set_frequencies(long, layer_type, rope_type, _limit(module, layer_type) + 1, short)
    return short, long


def rope_by_batch(decoder: nn.Module) -> None:
    """Undo `rope_by_own_length`."""
    for module in _rotary_embeddings(decoder):
        if _STOCK not in module.__dict__:
            continue
        module.rope_type = module.__dict__.pop(_STOCK)
        del module._modules[_SHORT], module._modules[_LONG]
        for key in [key for key, hook in module._forward_hooks.items() if hook is _by_own_length]:
            del module._forward_hooks[key]
            module._forward_hooks_with_kwargs.pop(key, None)


def rope_by_longest(decoder: nn.Module) -> str | None:
    """The class of a rotary embedding, of a family's own code, that gives a text other values beside a long one."""
    tried: set[type] = set()
    for module in decoder.modules():
        kind = type(module)
        if hasattr(module, _STOCK):
            tried.add(kind)  # its parts are of the same class
        if "rotary" in kind.__name__.lower() and kind not in tried and _sees_longest(module, decoder.config):
            return kind.__name__
        tried.add(kind)
    return None


def _sees_longest(module: nn.Module, config: PreTrainedConfig) -> bool:
    module = copy.deepcopy(module)  # what it keeps of the long text goes with the copy
    device = next((x.device for x in module.buffers()), torch.device("cpu"))
    positions = torch.arange(4, device=device)[None]
    far = torch.tensor([[4 * getattr(config, "max_position_embeddings", 1 << 17)]], device=device)
    x = torch.zeros(1, 5, 8, device=device, dtype=torch.float32)
    layer_types = module.rope_type if isinstance(getattr(module, "rope_type", None), dict) else [None]
    for layer_type in layer_types:
        by_type = {} if layer_type is None else {"layer_type": layer_type}
        try:
            alone = module(x[:, :4], positions, **by_type)
            beside = module(x, torch.cat([positions, far], dim=1), **by_type)
            alone, beside = (y if isinstance(y, tuple) else (y,) for y in (alone, beside))
            if not all(torch.equal(a, b[:, :4]) for a, b in zip(alone, beside, strict=True)):
                return True
        except Exception:  # it is called in another way, of which nothing is known
            return False
    return False


def positions_from_zero(position_ids: Tensor, layout: SequenceLayout, shape: tuple[int, int]) -> Tensor:
    """Positions (…, B, S) counted from each text's first, 0 on padding: the largest of a text then tells its length.

    Rotary attention sees differences of positions only, so nothing else changes.
    """
    flat = position_ids.expand(*position_ids.shape[:-2], *shape).flatten(-2)
    ids = layout.sequence_ids
    first = flat[..., layout.starts.long()[ids.clamp(min=0)].clamp(max=max(flat.shape[-1] - 1, 0))]
    return torch.where(ids >= 0, flat - first, 0).unflatten(-1, shape)


def _rotary_embeddings(decoder: nn.Module) -> list[nn.Module]:
    """Those that stock code updates; not our fixed copies within them."""
    found = [m for m in decoder.modules() if hasattr(m, "rope_type") and hasattr(type(m).forward, "__wrapped__")]
    parts = {id(part) for module in found for part in module.children()}
    return [module for module in found if id(module) not in parts]


def _rope_types(module: nn.Module) -> dict[str | None, str]:
    """Rope types by layer type, {None: type} where all layers share one."""
    return module.rope_type if isinstance(module.rope_type, dict) else {None: module.rope_type}


def _rope_type(module: nn.Module, layer_type: str | None) -> str:
    """The stock type."""
    types = getattr(module, _STOCK, module.rope_type)
    return types if layer_type is None else types[layer_type]


def _by_length(rope_type: str) -> bool:
    """As stock code decides it."""
    return "dynamic" in rope_type or rope_type == "longrope"


def _limit(module: nn.Module, layer_type: str | None) -> int:
    """The longest text, in tokens, that has the frequencies of a short one."""
    parameters = module.config.rope_parameters if layer_type is None else module.config.rope_parameters[layer_type]
    if _rope_type(module, layer_type) == "longrope":
        return parameters["original_max_position_embeddings"]
    return module.original_max_seq_len


def _fixed(module: nn.Module) -> nn.Module:
    """A copy that computes every text as a short one."""
    fixed, types = copy.deepcopy(module), _rope_types(module)
    fixed.__dict__.pop("forward", None)  # device_map puts one on the instance, bound to it
    named = {name: _FIXED if _by_length(rope_type) else rope_type for name, rope_type in types.items()}
    fixed.rope_type = named if isinstance(module.rope_type, dict) else named[None]
    for layer_type, rope_type in types.items():
        if _by_length(rope_type):  # texts that stock code saw before have left theirs
            prefix = "" if layer_type is None else f"{layer_type}_"
            _put(fixed, f"{prefix}inv_freq", getattr(module, f"{prefix}original_inv_freq").clone())
    return fixed


def _set_frequencies(
    module: nn.Module, layer_type: str | None, rope_type: str, length: int | Tensor, like: nn.Module
) -> None:
    """Give a fixed copy the frequencies of texts of ``length`` tokens, by transformers' own formula."""
    prefix = "" if layer_type is None else f"{layer_type}_"
    before = getattr(like, f"{prefix}inv_freq")
    by_type = {} if layer_type is None else {"layer_type": layer_type}
    found, scaling = ROPE_INIT_FUNCTIONS[rope_type](module.config, before.device, seq_len=length, **by_type)
    _put(module, f"{prefix}inv_freq", found.to(before.dtype))
    name = f"{prefix}attention_scaling"
    setattr(module, name if hasattr(module, name) else "attention_scaling", scaling)


def _put(module: nn.Module, name: str, value: Tensor) -> None:
    """Set a buffer that is not saved."""
    module._buffers.pop(name, None)
    module.register_buffer(name, value, persistent=False)


def _by_own_length(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Rotated) -> Rotated:
    """Behind a rotary embedding: what each text has alone."""
    given = {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}
    layer_type, positions = given.get("layer_type"), given["position_ids"]
    rope_type = _rope_type(module, layer_type)
    if not _by_length(rope_type):
        return output
    lengths, limit = _own_lengths(positions), _limit(module, layer_type)

    def computed(part: nn.Module, chosen: Tensor) -> Rotated:
        return part(**{**given, "position_ids": torch.where(chosen, positions, 0)})  # some look for the largest, too

    short = computed(getattr(module, _SHORT), lengths <= limit)
    if rope_type == "longrope":
        return _where(lengths > limit, computed(getattr(module, _LONG), lengths > limit), short)
    for length in lengths[lengths > limit].unique():
        part = _clone(getattr(module, _LONG))
        _set_frequencies(part, layer_type, rope_type, length, like=getattr(module, _SHORT))
        short = _where(lengths == length, computed(part, lengths == length), short)
    return short


def _clone(module: nn.Module) -> nn.Module:
    """A copy that shares tensors, whose buffers can be exchanged."""
    clone = copy.copy(module)
    clone._buffers = dict(module._buffers)
    clone._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
    return clone


def _own_lengths(position_ids: Tensor) -> Tensor:
    """(…, B, S) positions → (B, S) length of the text that each belongs to; a text ends where positions do not rise."""
    rows = position_ids.flatten(0, -3).amax(0) if position_ids.ndim > 2 else position_ids
    rises = rows[:, 1:] > rows[:, :-1]
    first = torch.cat([torch.ones_like(rows[:, :1], dtype=torch.bool), ~rises], dim=1)
    text, flat = first.flatten().cumsum(0) - 1, rows.flatten()
    return torch.zeros_like(flat).scatter_reduce(0, text, flat, "amax")[text].view(rows.shape) + 1


def _where(chosen: Tensor, a: Rotated, b: Rotated) -> Rotated:
    """Rows (B, S) of ``a`` where chosen, else of ``b``; the last axis is what a row holds."""
    if isinstance(a, Tensor):
        return torch.where(chosen[..., None], a, b)
    return tuple(torch.where(chosen[..., None], x, y) for x, y in zip(a, b, strict=True))
