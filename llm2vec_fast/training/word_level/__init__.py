"""Word-level tasks: a linear head on the outputs of a frozen encoder."""

from __future__ import annotations

from .arguments import WordLevelArguments
from .classifier import WordClassifier
from .stage import train_word_level

__all__ = ["WordClassifier", "WordLevelArguments", "train_word_level"]
