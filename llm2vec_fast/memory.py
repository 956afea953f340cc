"""How much memory there is, and what of it a process can give back without losing anything."""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path

import numpy as np
import psutil
from torch import Tensor

# Bits of an entry of /proc/self/pagemap (Linux, Documentation/admin-guide/mm/pagemap.rst)
_PRESENT, _SWAPPED, _OF_A_FILE = 63, 62, 61
# What a container may use, by the control groups' second and first version.
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def total_memory() -> int:
    """Bytes of memory that this machine has, or that its container may use; free or not."""
    return min([psutil.virtual_memory().total, *(limit for limit in map(_limit, _LIMITS) if limit)])


def _limit(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):  # "max" is no limit
        return None


def release_file_pages(tensor: Tensor) -> int:
    """Let go of the memory behind a tensor that was mapped from a file and never written to; read again when used.

    Weights that safetensors maps into memory are such. Nothing happens where a page was written to, where the tensor
    is not of a file, or on other systems than Linux.

    Args:
        tensor: contiguous, on the CPU.

    Returns:
        Bytes given back.
    """
    if sys.platform != "linux":
        return 0
    page = mmap.PAGESIZE
    first = -(-tensor.data_ptr() // page)
    last = (tensor.data_ptr() + tensor.nbytes) // page
    if last <= first or not _unwritten(first, last - first):
        return 0
    size = (last - first) * page
    failed = ctypes.CDLL(None).madvise(ctypes.c_void_p(first * page), ctypes.c_size_t(size), mmap.MADV_DONTNEED)
    return 0 if failed else size


def _unwritten(first: int, count: int) -> bool:
    """Whether dropping these pages loses nothing: all those present are a file's own, none has been copied to write."""
    try:
        with open("/proc/self/pagemap", "rb") as pagemap:
            pagemap.seek(first * 8)
            entries = np.frombuffer(pagemap.read(count * 8), np.uint64)
    except OSError:
        return False
    present, swapped, of_a_file = (entries >> np.uint64(bit) & np.uint64(1) for bit in (_PRESENT, _SWAPPED, _OF_A_FILE))
    return len(entries) == count and not swapped.any() and bool(of_a_file[present == 1].all())
