"""Weights laid out for the processor, made once for all that run them and made again when the weight has changed."""

from __future__ import annotations

import ctypes
import logging
import threading

from torch import Tensor

from ..kernels.linear import PackedWeight, pack_weight
from ..memory import release_file_pages

logger = logging.getLogger(__name__)
# Looked at before each use: two places take a microsecond, and each brings back up to 16 pages of a mapped file.
_SAMPLE_BYTES = 256


class Pack:
    """The packed copy of one weight. Copies and pickles begin without it: its layout is this machine's."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._made: tuple[PackedWeight | None, tuple] | None = None

    @property
    def is_made(self) -> bool:
        """Whether the copy takes memory now."""
        return self._made is not None

    def of(self, weight: Tensor) -> PackedWeight | None:
        """The packed weight, made at first use and again once the weight has been replaced or written to.

        Returns:
            None where there is no memory for it: the weight runs as it is.
        """
        stamp = _stamp(weight)
        made = self._made
        if made is None or made[1] != stamp:
            with self._lock:  # many threads may come here first
                if self._made is None or self._made[1] != stamp:
                    self._made = None  # the old copy's memory is needed for the new one
                    self._made = (_packed(weight), stamp)
                made = self._made
        return made[0]

    def __reduce__(self) -> tuple:
        return Pack, ()


def _packed(weight: Tensor) -> PackedWeight | None:
    try:
        packed = pack_weight(weight)
    except (MemoryError, RuntimeError) as error:
        logger.warning("a weight of %d MiB is not packed and runs slower: %s", weight.nbytes >> 20, error)
        return None
    release_file_pages(weight)  # mapped by safetensors: seldom read from now on
    return packed


def _stamp(weight: Tensor) -> tuple:
    """Changes with the weight: its place, the count of operations that wrote to it, and its first and last bytes.

    Fused optimisers and whoever writes through ``.data`` (peft, as it merges) change a weight and no count.
    """
    start, version = weight.data_ptr(), 0 if weight.is_inference() else weight._version
    if not weight.is_contiguous():
        return start, version
    size = min(_SAMPLE_BYTES, weight.nbytes)
    first, last = (ctypes.string_at(place, size) for place in (start, start + weight.nbytes - size))
    return start, version, first, last
