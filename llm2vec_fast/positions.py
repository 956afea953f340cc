"""Decoders that look positions up in a table, as GPT-2 and OPT do: how long a text may be."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

from torch import Tensor, nn

from .bidirectional import decoder_of


def within_positions(model: nn.Module, max_length: int) -> int:
    """``max_length``, or less where the model has a table with fewer positions, as a warning says.

    Rotary embeddings and their like have no end: a text longer than ``max_position_embeddings`` is computed as asked.
    """
    decoder = decoder_of(model)
    positions = getattr(decoder.config, "max_position_embeddings", None)
    if (
        positions is None
        or not isinstance(max_length, int)
        or max_length <= positions
        or positions not in _tables(decoder)
    ):
        return max_length
    warnings.warn(
        f"max_length={max_length} is beyond the {positions} positions that {type(decoder).__name__} has: texts are cut "
        f"to {positions} tokens",
        stacklevel=3,
    )
    return positions


def _tables(decoder: nn.Module) -> Iterator[int]:
    """Rows of whatever a decoder holds under the name of positions, learned or computed beforehand."""
    for name, module in decoder.named_modules():
        if isinstance(module, nn.Embedding) and _is_of_positions(name):
            yield module.num_embeddings - getattr(module, "offset", 0)  # OPT leaves the first two rows to padding
        yield from (len(x) for name, x in module.named_buffers(recurse=False) if _is_table(name, x))


def _is_table(name: str, x: Tensor) -> bool:
    return x.ndim == 2 and x.is_floating_point() and _is_of_positions(name)


def _is_of_positions(name: str) -> bool:
    last = name.rpartition(".")[2]
    return "pos" in last or last == "wpe"
