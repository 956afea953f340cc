"""Rotary frequencies of a GGUF file: base, scaling and per-frequency factors, as a configuration has them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from transformers import PreTrainedConfig

from llm2vec_fast.errors import ModelLoadError

FACTORS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
ROPE_TENSORS = (FACTORS, LONG, SHORT)
_SCALING = "rope.scaling."
_INERT = ("rope.scaling.finetuned",)
# The lengths that models scaled in the way of Llama 3.1 were first trained with, and its two bounds (all of one kind).
_ORIGINALS, _LOW, _HIGH = [2**n for n in range(5, 21)], 1.0, 4.0
_TOLERANCE = 1e-4  # of factors that are stored in float32

Refusal = Callable[[str], ModelLoadError]


def apply_rope(
    config: PreTrainedConfig, keys: Mapping[str, Any], tensors: Mapping[str, np.ndarray], refusal: Refusal
) -> dict[str, Any]:
    """Put what a file says of rotary frequencies into the configuration.

    Args:
        config: changed in place.
        keys: of the file's architecture.
        tensors: those of `ROPE_TENSORS` that it has, flat.
        refusal: makes the error from the thing that has no place in a configuration.

    Returns:
        The other keys.

    Raises:
        ModelLoadError: something has none.
    """
    rope = {name: value for name, value in keys.items() if name.startswith("rope.") and name not in _INERT}
    others = {name: value for name, value in keys.items() if not name.startswith("rope.")}
    parameters = getattr(config, "rope_parameters", None)
    if not isinstance(parameters, dict):
        if tensors or any(value for name, value in rope.items() if name.startswith(_SCALING)):
            raise refusal(f"{next(iter(tensors), 'scaled rotary frequencies')}")
        return others
    full = parameters.get("full_attention", parameters)
    _take_bases(rope, parameters, full)
    _check_dimension(config, full, rope, refusal)
    scaling = {name.removeprefix(_SCALING): rope.pop(name) for name in list(rope) if name.startswith(_SCALING)}
    old_linear = rope.pop("rope.scale_linear", 1.0)
    full |= _scaling(scaling if old_linear in (0, 1) else {"factor": old_linear, **scaling}, refusal)
    if LONG in tensors or SHORT in tensors:
        raise refusal(f"the tensor {LONG if LONG in tensors else SHORT}")
    if FACTORS in tensors:
        full |= _llama3(config, full, tensors[FACTORS], refusal)
    if rope:
        name, value = next(iter(rope.items()))
        raise refusal(f"the key {name}={value}")
    return others


def _take_bases(rope: dict[str, Any], parameters: dict[str, Any], full: dict[str, Any]) -> None:
    base = rope.pop("rope.freq_base", None)
    if base is not None:
        full["rope_theta"] = base
    windowed = parameters.get("sliding_attention")
    if windowed is not None and "rope.freq_base_swa" in rope:
        windowed["rope_theta"] = rope.pop("rope.freq_base_swa")


def _check_dimension(config: PreTrainedConfig, full: dict[str, Any], rope: dict[str, Any], refusal: Refusal) -> None:
    dimension = rope.pop("rope.dimension_count", None)
    if dimension is not None and dimension != _dimension(config, full):
        raise refusal(f"rope.dimension_count={dimension} where the configuration has {_dimension(config, full)}")


def _dimension(config: PreTrainedConfig, full: Mapping[str, Any]) -> int:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(head * full.get("partial_rotary_factor", 1.0))


def _scaling(scaling: dict[str, Any], refusal: Refusal) -> dict[str, Any]:
    """transformers' parameters from the keys ``rope.scaling.*``, which the converter copied from such parameters."""
    scaling = {name: value for name, value in scaling.items() if value not in (None, "", 0)}
    kind = scaling.pop("type", "linear" if scaling.get("factor", 1.0) != 1.0 else "none")
    factor, original = scaling.pop("factor", 1.0), scaling.pop("original_context_length", None)
    if scaling or kind not in ("none", "linear", "yarn"):
        name, value = next(iter(scaling.items()), ("type", kind))
        raise refusal(f"the key rope.scaling.{name}={value}")
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return {}
    known = {"rope_type": kind, "factor": factor}
    return known if kind == "linear" or original is None else {**known, "original_max_position_embeddings": original}


def _llama3(config: PreTrainedConfig, full: Mapping[str, Any], factors: np.ndarray, refusal: Refusal) -> dict[str, Any]:
    """The scaling of Llama 3.1 that makes these factors, one a frequency; none where all of them are 1."""
    if np.allclose(factors, 1.0, rtol=_TOLERANCE):
        return {}
    scaled = full.get("rope_type", "default") != "default"
    frequencies = full["rope_theta"] ** -(np.arange(0, _dimension(config, full), 2) / _dimension(config, full))
    factor = float(factors.max())
    for original in [] if scaled or len(factors) != len(frequencies) else _ORIGINALS:
        if np.allclose(_factors(frequencies, factor, original), factors, rtol=_TOLERANCE):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": _LOW,
                "high_freq_factor": _HIGH,
                "original_max_position_embeddings": original,
            }
    raise refusal(f"the tensor {FACTORS} with factors that no known scaling makes")


def _factors(frequencies: np.ndarray, factor: float, original: int) -> np.ndarray:
    """As the converter computes them by wavelength: 1 below one bound, ``factor`` above the other, else in between."""
    waves = 2 * math.pi / frequencies
    smooth = ((original / waves - _LOW) / (_HIGH - _LOW)).clip(0, 1)
    return 1 / ((1 - smooth) / factor + smooth)
