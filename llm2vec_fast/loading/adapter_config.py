"""What an adapter's configuration may say: the settings listed here become peft's, all else is refused or inert."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

from peft import LoraConfig, PeftConfig

from llm2vec_fast.errors import ModelLoadError


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(x, str) for x in value)


def _integers(value: Any) -> bool:
    return isinstance(value, list) and all(type(x) is int for x in value)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _pattern(kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(isinstance(k, str) and kind(v) for k, v in value.items())


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _rank(value: Any) -> bool:
    return type(value) is int and value > 0


# What decides an adapter's effect, and what it may be. peft computes it as on the model the adapter was made for.
_HONOURED: dict[str, Callable[[Any], bool]] = {
    "r": _rank,
    "lora_alpha": _number,
    "lora_dropout": _number,
    "target_modules": lambda value: isinstance(value, str) or _texts(value),
    "exclude_modules": lambda value: isinstance(value, str) or _texts(value),
    "layers_to_transform": lambda value: type(value) is int or _integers(value),
    "layers_pattern": lambda value: isinstance(value, str) or _texts(value),
    "rank_pattern": _pattern(_rank),
    "alpha_pattern": _pattern(_number),
    "modules_to_save": _texts,
    "trainable_token_indices": lambda value: _integers(value) or _pattern(_integers)(value),
    "target_parameters": _texts,
    "fan_in_fan_out": _flag,
    "use_rslora": _flag,
    "use_dora": _flag,
    "lora_bias": _flag,
    "bias": lambda value: value in ("none", "all", "lora_only"),
}
# What does not: of whom and when, how training began, and how it went. ``megatron_core`` names a module to import.
_INERT = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "inference_mode",
    "init_lora_weights", "loftq_config", "lora_ga_config", "megatron_core", "peft_type", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip
# Of those that decide it, the ones that an adapter of nothing but low-rank products may have.
_ADDITIVE = {
    "alpha_pattern", "exclude_modules", "fan_in_fan_out", "layers_pattern", "layers_to_transform", "lora_alpha",
    "lora_dropout", "r", "rank_pattern", "target_modules", "use_rslora",
}  # fmt: skip
# The first weights of an adapter are overwritten by those of its file; other beginnings change the base's as well.
_HARMLESS_BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


def lora_config_of(found: Mapping[str, Any], adapter: str) -> LoraConfig:
    """The configuration of a downloaded adapter, frozen, with nothing in it but what is listed here.

    Raises:
        ModelLoadError: it is of another kind than LoRA, or asks for what is not computed here.
    """
    kind = found.get("peft_type", "LORA")
    if kind != "LORA":
        raise ModelLoadError(
            f"the adapter {adapter} is of type {kind} and only LORA is read: merge it with peft's merge_and_unload(), "
            "where peft can, and pass the model that comes out"
        )
    given = {name: value for name, value in found.items() if not _is_empty(value) or name == "bias"}
    for name, value in given.items():
        if name not in _HONOURED and name not in _INERT:
            raise ModelLoadError(
                f"the adapter {adapter} asks for {name}={value!r}, which is not computed here: merge it with peft's "
                "merge_and_unload(), where peft can, and pass the model that comes out"
            )
        if name in _HONOURED and not _HONOURED[name](value):
            raise ModelLoadError(f"the adapter {adapter} has {name}={value!r} in its configuration: that is damaged")
    beginning = found.get("init_lora_weights")
    if beginning not in _HARMLESS_BEGINNINGS:
        raise ModelLoadError(
            f"the adapter {adapter} began with init_lora_weights={beginning!r}, which changes the base's weights, too: "
            "save it again with peft's save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    settings = {name: value for name, value in given.items() if name in _HONOURED}
    return LoraConfig(**settings, inference_mode=True)


def as_saved(config: PeftConfig) -> dict[str, Any]:
    """A configuration as adapter_config.json has it."""
    found = {name: sorted(x) if isinstance(x, set) else x for name, x in config.to_dict().items()}
    return {name: x.value if isinstance(x, Enum) else x for name, x in found.items()}


def is_additive(setting: str) -> bool:
    """Whether a setting leaves an adapter one of low-rank products, whatever its value; for messages."""
    return setting in _ADDITIVE or setting in _INERT


def _is_empty(value: Any) -> bool:
    return value is None or value is False or value in ({}, [], "")
