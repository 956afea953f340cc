"""Training: the stages of the recipe on transformers' Trainer, and GradCache for training loops of one's own.

A stage is its arguments and a function: ``train_simcse(SimcseArguments(...))``. Each is imported by its first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .grad_cache import GradCache

if TYPE_CHECKING:
    from .arguments import ContrastiveArguments, MntpArguments, SimcseArguments
    from .contrastive import train_contrastive
    from .mntp import train_mntp
    from .simcse import train_simcse
    from .word_level import WordLevelArguments, train_word_level

__all__ = [
    "ContrastiveArguments",
    "GradCache",
    "MntpArguments",
    "SimcseArguments",
    "WordLevelArguments",
    "train_contrastive",
    "train_mntp",
    "train_simcse",
    "train_word_level",
]

_HOMES = {
    "ContrastiveArguments": ".arguments",
    "MntpArguments": ".arguments",
    "SimcseArguments": ".arguments",
    "WordLevelArguments": ".word_level",
    "train_contrastive": ".contrastive",
    "train_mntp": ".mntp",
    "train_simcse": ".simcse",
    "train_word_level": ".word_level",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)
