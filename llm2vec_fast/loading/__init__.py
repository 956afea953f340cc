"""From names and paths to models: one place that finds files, reads them, and refuses what cannot be read right.

`hub` finds folders and commits, `stack` tells what a model is made of, `models` loads it, `adapters` puts adapters on,
`origin` knows afterwards where the weights came from. What is named here comes on first use: finding files is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PLACES = {
    "adapters": ("adapter_weights", "merged", "put_on", "wrapped_in"),
    "below": ("require_below", "write_below"),
    "devices": ("best_device", "placement"),
    "files": ("ADAPTER_CONFIG", "ADAPTER_WEIGHTS", "CONFIG", "SETTINGS_FILE", "Source"),
    "hub": ("HubOptions", "locate"),
    "models": ("Loaded", "load", "load_decoder", "load_stack"),
    "origin": ("Origin", "first_difference", "origin_of", "own_weights", "remember", "same"),
    "settings": ("CAUSAL", "CHECKPOINT", "ENCODER_SETTINGS"),
    "stack": ("Stack", "resolve"),
}
_HOMES = {name: module for module, names in _PLACES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
