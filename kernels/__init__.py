"""Fused operations for bidirectional encoders. They know tensors, and nothing of models or files."""

from .attention import attention
from .layout import SequenceLayout

__all__ = ["SequenceLayout", "attention"]
