"""Whether the weights under an adapter are those of the base that it is to name: compared, not believed."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import nn

from llm2vec_fast.bidirectional import decoder_of
from llm2vec_fast.errors import ModelLoadError, UserError
from llm2vec_fast.loading import (
    HubOptions,
    Origin,
    first_difference,
    load_decoder,
    locate,
    merged,
    origin_of,
    own_weights,
    put_on,
    same,
)
from llm2vec_fast.loading.joinable import merged_with_update
from llm2vec_fast.loading.lowrank import Update

MERGE = "save(folder, merge_before_save=True) writes the whole model"


class SaveError(UserError):
    """What is in memory cannot be written so that the same comes back."""


def base_of_memory(model: nn.Module) -> Origin:
    """What the weights under a model's adapters are of, after comparing them with the files.

    Raises:
        SaveError: there are no such files, or they hold other weights.
    """
    origin = origin_of(model) or _guess(model)
    try:
        odd = _first_difference(model, origin)
    except (OSError, ModelLoadError) as error:
        raise SaveError(
            f"the base {origin.decoder.name} of the adapter cannot be read any more ({error}): {MERGE}"
        ) from error
    if odd is not None:
        below = "".join(f" with {adapter.name}" for adapter in origin.merged)
        raise SaveError(
            f"the weights under the adapter are not those of {origin.decoder.name}{below} ({odd} differs): the adapter "
            f"alone would load to something else; {MERGE}"
        )
    return origin


def _first_difference(model: nn.Module, origin: Origin) -> str | None:
    dtype = origin.options.get("dtype")
    if not origin.merged and not origin.decoder.is_gguf:
        try:
            return first_difference(decoder_of(model), origin.decoder, dtype)
        except LookupError:
            pass  # stored under other names, or quantised
    other = _decoder_again(origin)
    for adapter in origin.merged:
        other = merged(put_on(other, adapter))
    return _difference_to(model, other, dtype)


def updates_below(origin: Origin) -> list[Update]:
    """What the adapters that were merged on loading added.

    Raises:
        NotJoinableError: one of them is not plain LoRA.
    """
    if not origin.merged:
        return []
    model, updates = _decoder_again(origin), []
    for adapter in origin.merged:
        model, update = merged_with_update(model, adapter)
        updates.append(update)
    return updates


def _guess(model: nn.Module) -> Origin:
    """For a model that was not loaded here: the place that it names."""
    name = str(getattr(decoder_of(model), "name_or_path", "") or "")
    if not name and isinstance(model, PeftModel):
        name = str(model.active_peft_config.base_model_name_or_path or "")
    if not name:
        raise SaveError(f"the model under the adapter was not loaded from anywhere that could be named: {MERGE}")
    try:
        source = locate(name, HubOptions(local_files_only=True))
    except ModelLoadError as error:
        raise SaveError(f"the adapter's base cannot be compared with the weights ({error}): {MERGE}") from error
    return Origin(source)


def _decoder_again(origin: Origin) -> nn.Module:
    options: dict[str, Any] = {"dtype": torch.float32, **origin.options}
    options.pop("device_map", None)
    return load_decoder(origin.decoder, **options)


def _difference_to(model: nn.Module, other: nn.Module, dtype: torch.dtype | None) -> str | None:
    theirs, ours = dict(own_weights(other)), dict(own_weights(model))
    for name in sorted(theirs.keys() ^ ours.keys()):
        return name
    return next((name for name, weight in ours.items() if not same(theirs[name], weight, dtype)), None)
