"""How good an encoder is: sentence similarity."""

from __future__ import annotations

from .sts import sts_spearman

__all__ = ["sts_spearman"]
