"""Which files a model's weights are of: noted where they are loaded, and checked against the files where it matters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from llm2vec_fast.bidirectional import decoder_of

from .files import Source, json_of

_ATTRIBUTE = "_llm2vec_fast_origin"
_WRAPPERS = ("base_layer", "original_module", "token_adapter")  # around a weight of the model's own


@dataclass(frozen=True)
class Origin:
    """What a model was loaded from.

    Attributes:
        decoder: the weights.
        merged: adapters that were merged into them, in order.
        options: how they were loaded, as `load_decoder` takes it.
    """

    decoder: Source
    merged: tuple[Source, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


def remember(model: nn.Module, origin: Origin) -> None:
    """Note where a model comes from."""
    decoder_of(model).__dict__[_ATTRIBUTE] = origin


def origin_of(model: nn.Module) -> Origin | None:
    """What `load` noted of a model; None of one that somebody else made."""
    return decoder_of(model).__dict__.get(_ATTRIBUTE)


def own_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The decoder's weights without those of adapters, by the names that they have without adapters."""
    for name, weight in decoder_of(model).state_dict().items():
        parts = name.split(".")
        if any(part.startswith(("lora_", "trainable_tokens_")) for part in parts):
            continue
        if "modules_to_save" in parts:
            continue
        yield ".".join(part for part in parts if part not in _WRAPPERS), weight


def first_difference(model: nn.Module, source: Source, dtype: torch.dtype | None) -> str | None:
    """The first weight of a decoder, adapters aside, that is another than in the files of ``source``.

    Files are read a tensor at a time.

    Args:
        model: the decoder, perhaps with adapters that are not merged.
        source: a folder of safetensors.
        dtype: what the weights were loaded in; None for what they are in now.

    Returns:
        Its name, None if there is none.

    Raises:
        LookupError: the files name weights in another way than the model, so that this cannot be told.
    """
    places = dict(_places(source))
    weights = dict(own_weights(model))
    prefix = _best_prefix(weights, places)
    tied = _tied(weights)
    for name, weight in weights.items():
        stored = next((prefix + alias for alias in tied[name] if prefix + alias in places), None)
        if stored is None:
            raise LookupError(name)
        with safe_open(places[stored], framework="pt") as file:
            if not same(file.get_tensor(stored), weight, dtype):
                return name
    return None


def same(stored: Tensor, weight: Tensor, dtype: torch.dtype | None) -> bool:
    """Whether a weight is what was stored, loaded in ``dtype`` and perhaps cast since."""
    if stored.shape != weight.shape:
        return False
    if weight.dtype.is_floating_point:
        stored = stored.to(dtype or weight.dtype).to(weight.dtype)
    here = weight.detach().cpu()
    return torch.equal(stored, here) or bool(((stored == here) | (stored.isnan() & here.isnan())).all())


def _places(source: Source) -> Iterator[tuple[str, Path]]:
    """Each stored tensor with the file it is in: the whole one, else those of the index, as transformers chooses."""
    whole, index = source.file("model.safetensors"), source.file("model.safetensors.index.json")
    if whole is not None:
        with safe_open(whole, framework="pt") as file:
            yield from ((name, whole) for name in file.keys())  # noqa: SIM118
    elif index is not None:
        for name, shard in (json_of(index).get("weight_map") or {}).items():
            yield name, source.place / shard


def _best_prefix(weights: Mapping[str, Tensor], places: Mapping[str, Path]) -> str:
    name = next(iter(weights))
    found = sorted((x.removesuffix(name) for x in places if x == name or x.endswith(f".{name}")), key=len)
    if not found:
        raise LookupError(name)
    return found[0]


def _tied(weights: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """The names of each weight: its own, and those of weights that are the same memory."""
    groups: dict[tuple[int, torch.Size], list[str]] = {}
    for name, weight in weights.items():
        groups.setdefault((weight.data_ptr(), weight.shape), []).append(name)
    return {name: [name, *groups[weight.data_ptr(), weight.shape]] for name, weight in weights.items()}
