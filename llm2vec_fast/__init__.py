"""Turn any decoder-only language model into a fast text encoder.

Importing this package is cheap: PyTorch and transformers are imported by the first use of a name below.
"""

from __future__ import annotations

import gc
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .acceleration import accelerate
    from .bidirectional import make_bidirectional
    from .encoder import LLM2Vec

__all__ = ["LLM2Vec", "accelerate", "make_bidirectional"]

_HOMES = {"LLM2Vec": ".encoder", "accelerate": ".acceleration", "make_bidirectional": ".bidirectional"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_imported(_HOMES[name]), name)


def _imported(home: str) -> ModuleType:
    """Import a module, and collect no garbage meanwhile.

    PyTorch and transformers make a million objects that all stay: to look through them again and again takes 0.55 s of
    3.4 (measured with torch 2.13 and transformers 5.24 on one core).
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        return import_module(home, __name__)
    finally:
        if enabled and not gc.get_freeze_count():
            gc.freeze()
            gc.unfreeze()  # now all of them count as old, and are not looked through as new ones would be
        if enabled:
            gc.enable()


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
