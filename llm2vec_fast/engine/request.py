"""What is asked of the engine, and what it gives back."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError

OnBatch = Callable[[int, int, int], None]  # rows, tokens, tokens with padding
OnProblem = Callable[[int, str], None]  # the place of a text, and why it has no embedding


@dataclass(frozen=True)
class Request:
    """What is wanted of each text; see `LLM2Vec.encode`. ``width`` is how many columns are kept."""

    tokens: bool
    skip_prompt: bool
    normalize: bool
    width: int
    token_budget: int
    keep_non_finite: bool
    as_arrays: bool = True


@dataclass(frozen=True)
class TokenEmbeddings:
    """The tokens of one text.

    Attributes:
        embeddings: (tokens, d) float32.
        offsets: (tokens, 2) int64, the characters [first, last) of the text each token covers; first = last on tokens
            that stand for none, such as an added begin token.
        ids: (tokens,) int64.
    """

    embeddings: Tensor | np.ndarray
    offsets: Tensor | np.ndarray
    ids: Tensor | np.ndarray


@dataclass(frozen=True)
class Row:
    """One text's result: its embedding (d,), or its token embeddings (tokens, d) with their offsets and ids."""

    values: np.ndarray
    offsets: np.ndarray | None = None
    ids: np.ndarray | None = None


def one_of(name: str, value: str, choices: Sequence[str]) -> str:
    """The value of an argument that has few.

    Raises:
        ValueError: it is none of them.
    """
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown: choose {' or '.join(choices)}")
    return value


def checked_width(truncate_dim: int | None, dimension: int) -> int:
    """Columns to keep of the model's ``dimension``.

    Raises:
        ValueError: there are not as many.
    """
    if truncate_dim is not None and not 1 <= truncate_dim <= dimension:
        raise ValueError(f"truncate_dim={truncate_dim} is not between 1 and the model's {dimension} columns")
    return truncate_dim or dimension


def checked_device(device: str | torch.device) -> torch.device:
    """The device of that name.

    Raises:
        UserError: it is not there, or is more than one.
    """
    if isinstance(device, Sequence) and not isinstance(device, str):
        raise UserError(f"device={device!r} is a list, and encode runs on one device: start a process for each")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"device={device!r} cannot be used ({reason}): give one that this machine has") from error
    return torch.device(device)


def as_asked(rows: Sequence[Row], request: Request) -> Tensor | np.ndarray | list[TokenEmbeddings]:
    """(N, d), or token embeddings of N texts, as tensors or arrays."""
    wrap = (lambda array: array) if request.as_arrays else torch.from_numpy
    if request.tokens:
        return [TokenEmbeddings(wrap(row.values), wrap(row.offsets), wrap(row.ids)) for row in rows]
    return wrap(np.stack([row.values for row in rows]) if rows else np.empty((0, request.width), np.float32))


def warn_of_batch_size(batch_size: int, token_budget: int) -> None:
    """Tell the caller of `encode` that its batch_size, which the original has, means nothing here."""
    warnings.warn(
        f"batch_size={batch_size} is not used: batches are made of token_budget={token_budget} tokens, pass a smaller "
        "one to save memory",
        stacklevel=3,
    )
