"""Training: gradients of large contrastive batches in the memory of small ones."""

from __future__ import annotations

from .grad_cache import GradCache

__all__ = ["GradCache"]
