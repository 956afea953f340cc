"""Turn any decoder-only language model into a fast text encoder.

Importing this package is cheap: PyTorch and transformers are imported by the first use of a name below.
"""

from __future__ import annotations

from importlib import import_module
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
    return getattr(import_module(_HOMES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
