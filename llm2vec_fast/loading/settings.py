"""What a saved encoder's settings may say: names and types are those listed here, whoever wrote the file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm2vec_fast.errors import ModelLoadError
from llm2vec_fast.kernels.pooling import POOLING_MODES

ENCODER_SETTINGS = ("pooling_mode", "max_length", "doc_max_length", "skip_instruction")
CAUSAL, CHECKPOINT = "enable_bidirectional", "checkpoint"


def checked_settings(found: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The settings of an ``llm2vec_config.json`` that an encoder knows; what else it holds is of no meaning here.

    Raises:
        ModelLoadError: one of them is of another type or kind.
    """
    settings = {name: found[name] for name in (*ENCODER_SETTINGS, CAUSAL, CHECKPOINT) if found.get(name) is not None}
    for name, value in settings.items():
        wanted = _refusal(name, value)
        if wanted:
            raise ModelLoadError(f"{where} has {name}={value!r}, which is not {wanted}: correct it, or delete it there")
    return settings


def _refusal(name: str, value: Any) -> str | None:
    if name == "pooling_mode":
        return None if isinstance(value, str) and value in POOLING_MODES else f"one of {', '.join(POOLING_MODES)}"
    if name in ("max_length", "doc_max_length"):
        good = isinstance(value, int) and not isinstance(value, bool) and value > 0
        return None if good else "a positive number of tokens"
    if name == CHECKPOINT:
        return None if isinstance(value, str) else "the name of a checkpoint"
    return None if isinstance(value, bool) else "true or false"
