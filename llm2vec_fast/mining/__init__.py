"""Hard negatives: documents that an encoder finds near a query, and that are not its own."""

from __future__ import annotations

from llm2vec_fast.mining.job import MiningStoppedError, Outcome, mine
from llm2vec_fast.mining.settings import MiningSettings

__all__ = ["MiningSettings", "MiningStoppedError", "Outcome", "mine"]
