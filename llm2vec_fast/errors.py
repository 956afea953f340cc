"""Errors that are about what the user gave, not about this code: one sentence each, shown without a traceback."""

from __future__ import annotations

_OUT_OF_MEMORY = (
    "out of memory",  # CUDA, ROCm, XPU, MPS
    "outofmemory",
    "allocate memory",  # PyTorch's CPU allocator, with Linux's own words
    "not enough memory",  # the same on Windows
    "alloc_failed",  # cuBLAS, cuDNN
    "bad_alloc",
)


class UserError(Exception):
    """Something the user can put right. The message is one sentence: the bad thing, its value, and what to do."""


class ModelLoadError(UserError):
    """The model, its tokenizer or its adapter cannot be loaded."""


class NonFiniteEmbeddingError(UserError):
    """A text's embedding holds NaN or infinity, in float32 too."""


class InputError(UserError):
    """An input of a bulk job cannot be used: missing, empty, of an unknown format, without the column asked for."""


class OutputError(UserError):
    """An output folder cannot be used or written: foreign files, no space, a damaged part."""


class ChangedError(UserError):
    """The inputs, the model or the settings differ from those an output folder was started with."""


class JobRunningError(UserError):
    """Another process is writing the same output folder."""


class UnsupportedModelError(UserError):
    """The model cannot attend both ways through transformers' attention interface."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a device or in the machine: libraries tell it in many ways."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    told = str(error).lower()
    return isinstance(error, RuntimeError | OSError) and any(words in told for words in _OUT_OF_MEMORY)
