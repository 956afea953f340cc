"""What depends on a batch's layout alone is worked out once, however many layers of a forward pass ask for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TypeVar

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Result = TypeVar("Result")


def once_a_layout(build: Callable[..., Result]) -> Callable[..., Result]:
    """Remember ``build(starts, lengths, *settings)`` while the tensor ``lengths`` lives.

    It is built anew once either tensor has been written to; PyTorch does not tell for tensors made in inference mode,
    which must not be written to. The result must not hold ``lengths`` itself, or neither is ever freed.
    """
    made: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    @wraps(build)
    def remembered(starts: Tensor, lengths: Tensor, *settings: object) -> Result:
        results = made.setdefault(lengths, {})
        versions = (_version(starts), _version(lengths))
        if settings in results:
            made_from, made_at, result = results[settings]
            if made_from is starts and made_at == versions:
                return result
        result = build(starts, lengths, *settings)
        results[settings] = (starts, versions, result)
        return result

    return remembered


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
