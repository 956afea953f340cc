"""Training: the stages of the recipe on transformers' Trainer, and GradCache for training loops of one's own.

A stage is its arguments and a function: ``train_simcse(SimcseArguments(...), callbacks=[...])``. What it is made of, a
Trainer and a collator of its batches, is here, too. Each is imported by its first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .grad_cache import GradCache

if TYPE_CHECKING:
    from .arguments import ContrastiveArguments, MntpArguments, SimcseArguments
    from .contrast import ContrastiveTrainer
    from .contrastive import PairCollator, train_contrastive
    from .mntp import MntpCollator, MntpTrainer, train_mntp
    from .simcse import SimcseCollator, train_simcse
    from .word_level import WordLevelArguments, train_word_level

__all__ = [
    "ContrastiveArguments",
    "ContrastiveTrainer",
    "GradCache",
    "MntpArguments",
    "MntpCollator",
    "MntpTrainer",
    "PairCollator",
    "SimcseArguments",
    "SimcseCollator",
    "WordLevelArguments",
    "train_contrastive",
    "train_mntp",
    "train_simcse",
    "train_word_level",
]

_HOMES = {
    "ContrastiveArguments": ".arguments",
    "ContrastiveTrainer": ".contrast",
    "MntpArguments": ".arguments",
    "MntpCollator": ".mntp",
    "MntpTrainer": ".mntp",
    "PairCollator": ".contrastive",
    "SimcseArguments": ".arguments",
    "SimcseCollator": ".simcse",
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
