"""Adapters on a decoder: read, made to fit its names, put on, merged; every weight finds its place or it is refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from llm2vec_fast.bidirectional import decoder_of
from llm2vec_fast.errors import ModelLoadError

from .adapter_config import lora_config_of
from .adapter_names import PREFIX, fitted
from .files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Source, one_line
from .quiet import quiet


def put_on(model: nn.Module, adapter: Source) -> PeftModel:
    """Wrap a model in the adapter, frozen.

    The adapter may have been made for the decoder alone, for the model with its head, or by the original training
    scripts: names in its weights and in its configuration are understood as those of the model it was made for.

    Raises:
        ModelLoadError: the adapter cannot be read, was made for a model of another family or shape, or asks for
            something that is not computed here.
    """
    found = adapter.json(ADAPTER_CONFIG)
    if found is None:
        raise ModelLoadError(f"the adapter {adapter.name} has no {ADAPTER_CONFIG}: pass the folder that holds it")
    _refuse_other_family(found, model, adapter.name)
    return wrapped_in(model, found, _weights(adapter), adapter.name)


def wrapped_in(model: nn.Module, found: Mapping[str, Any], weights: Mapping[str, Tensor], adapter: str) -> PeftModel:
    """`put_on` of an adapter's configuration and weights, as its files have them."""
    try:
        config, names = fitted(lora_config_of(found, adapter), weights, model, adapter)
        config.base_model_name_or_path = model.name_or_path  # which may have moved since
        with quiet():
            wrapped = get_peft_model(model, config)
            _fill(wrapped, {new: weights[old] for old, new in names.items()}, adapter)
    except ModelLoadError:
        raise
    except (ValueError, RuntimeError, TypeError, KeyError, AttributeError, re.error) as error:
        # peft's of layers of other names and weights of another shape, re's of a pattern that is none
        raise ModelLoadError(f"the adapter {adapter} does not fit this base: {one_line(error)}") from error
    return wrapped.eval()


def merged(wrapped: PeftModel) -> nn.Module:
    """The model alone, its adapter merged into its weights.

    Raises:
        ModelLoadError: peft cannot merge an adapter of this kind, or would merge it into other layers, too.
    """
    _refuse_shared_weights(wrapped)
    try:
        model = wrapped.merge_and_unload()
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise ModelLoadError(
            f"the adapter {wrapped.active_adapter} cannot be merged into {type(wrapped.get_base_model()).__name__} "
            f"({one_line(error)}): use it apart (merge_peft=False)"
        ) from error
    model.__dict__.pop("peft_config", None)  # older releases of peft leave it, and take it for an adapter in place
    return model


def _refuse_shared_weights(wrapped: PeftModel) -> None:
    """peft merges into the weight that two layers share what was trained for one of them."""
    base = wrapped.get_base_model()
    adapted = {name: x.base_layer for name, x in base.named_modules() if isinstance(x, LoraLayer)}
    users: dict[int, set[str]] = {}
    for name, weight in base.named_parameters(remove_duplicate=False):
        users.setdefault(id(weight), set()).add(name.rpartition(".")[0].removesuffix(".base_layer"))
    for name, layer in adapted.items():
        others = users.get(id(getattr(layer, "weight", None)), {name}) - {name}
        if others:
            raise ModelLoadError(
                f"the adapter on {name} cannot be merged into {type(base).__name__}, where {min(others)} shares its "
                "weight: use it apart (merge_peft=False), or train it again without this layer"
            )


def adapter_weights(wrapped: PeftModel, name: str | None = None, weights: dict[str, Tensor] | None = None) -> dict:
    """The weights of an adapter by the names that peft saves them under, asking nothing of a hub."""
    return get_peft_model_state_dict(
        wrapped, state_dict=weights, adapter_name=name or wrapped.active_adapter, save_embedding_layers=False
    )


def _fill(wrapped: PeftModel, weights: dict[str, Tensor], adapter: str) -> None:
    """Load the weights; the file has to hold exactly those that the configuration makes."""
    expected = {key.replace("._orig_mod", "") for key in adapter_weights(wrapped)}
    spare = set(weights) - expected
    allowed = {key for key in spare if _is_embedding(key, wrapped)}  # peft saves those beside an adapter of theirs
    lost = sorted(spare - allowed) + sorted(expected - set(weights))
    if lost:
        raise ModelLoadError(
            f"the adapter {adapter} does not fit this base: {lost[0]} and {len(lost) - 1} others have no counterpart"
        )
    rows = wrapped.get_base_model().get_input_embeddings().weight.shape[0]
    resized = next((key for key in sorted(allowed) if weights[key].shape[0] != rows), None)
    if resized is not None:
        raise ModelLoadError(
            f"the adapter {adapter} comes with an embedding of {weights[resized].shape[0]:,} tokens and this base has "
            f"{rows:,}: resize the base as it was for training, or merge the adapter into that with peft"
        )
    result = set_peft_model_state_dict(wrapped, weights)
    if result.unexpected_keys:
        raise ModelLoadError(
            f"the adapter {adapter} does not fit this base: {result.unexpected_keys[0]} has no counterpart"
        )


def _is_embedding(key: str, wrapped: PeftModel) -> bool:
    """Whether a weight is that of the input embedding or of the output layer themselves."""
    base = wrapped.get_base_model()
    both = base.get_input_embeddings(), base.get_output_embeddings()
    names = [name for name, module in base.named_modules() if any(module is x for x in both)]
    return any(key in (f"{PREFIX}{name}.weight", f"{PREFIX}{name}.base_layer.weight") for name in names)


def _weights(adapter: Source) -> dict[str, Tensor]:
    path = adapter.file(ADAPTER_WEIGHTS)
    if path is None:
        if adapter.file("adapter_model.bin") is not None:
            raise ModelLoadError(
                f"the adapter {adapter.name} has its weights only as pickle (adapter_model.bin), which can run any "
                "code when read: convert it where you trust it, with peft's save_pretrained(safe_serialization=True)"
            )
        raise ModelLoadError(f"the adapter {adapter.name} has no {ADAPTER_WEIGHTS}")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelLoadError(f"the adapter's file {path} is damaged: {one_line(error)}") from error


def _refuse_other_family(found: dict, model: nn.Module, adapter: str) -> None:
    mapping = found.get("auto_mapping")
    made_for = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    if isinstance(made_for, str) and not _of_one_family(made_for, decoder_of(model).config.model_type):
        raise ModelLoadError(
            f"the adapter {adapter} was made for a {made_for} and this base is a {type(model).__name__}: pass the base "
            f"it was made for, {found.get('base_model_name_or_path')}"
        )


def _of_one_family(class_name: str, model_type: str) -> bool:
    """Whether a class such as MistralBiModel may be one of ``model_type``; one that no family's name begins may be any.

    Layers of two families can have the same names and shapes, so that neither tells an adapter's base.
    """
    families = [kind.replace("_", "").replace("-", "") for kind in CONFIG_MAPPING_NAMES]
    own, name = model_type.replace("_", "").replace("-", ""), class_name.lower()
    family = max((kind for kind in families if name.startswith(kind)), key=len, default=own)
    return family.startswith(own) or own.startswith(family)
