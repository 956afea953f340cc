"""Which texts share a forward pass: batches by a token budget, texts of near-equal length together.

A plan is a function of the texts' lengths and of the settings. It does not know how many cores there are, nor how much
memory is free, so that a run repeated anywhere is a run with the same batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import numpy as np
import torch

# A batch a core, SmolLM2-135M: throughput is flat from 1,000 to 2,000 tokens, where a layer's activations stay in
# cache, and falls on both sides. A GPU wants enough rows to fill its multiprocessors.
CPU_TOKEN_BUDGET = 2048
CPU_LEAST_TOKENS = 1024
GPU_TOKEN_BUDGET = 32768
_SHARES = (8, 4, 2)  # numbers of cores that come out even
_FULL = 0.9  # of the budget: texts do not fill a batch to the last token


def default_token_budget(device: torch.device | str) -> int:
    """Tokens a forward pass holds unless the user says otherwise."""
    return CPU_TOKEN_BUDGET if torch.device(device).type == "cpu" else GPU_TOKEN_BUDGET


def even_count(tokens: int, token_budget: int) -> int:
    """How many batches of about equal size leave no core of a CPU idle in the end, however many it has.

    3 batches on 2 cores take as long as 4. So the number is a multiple of 8, or of 4 or 2 where batches would otherwise
    have less than CPU_LEAST_TOKENS (or than the budget, if that is less).

    Raises:
        ValueError: the budget is not positive.
    """
    _check_budget(token_budget)
    least = min(CPU_LEAST_TOKENS, token_budget)
    shares = next((n for n in _SHARES if tokens >= n * least), 1)
    return shares * max(1, ceil(tokens / (_FULL * token_budget * shares)))


def plan_batches(lengths: Sequence[int], token_budget: int, count: int | None = None) -> list[np.ndarray]:
    """Cut texts into batches of at most ``token_budget`` tokens; a longer text gets a batch of its own.

    Args:
        lengths: tokens of each text.
        token_budget: the most tokens a batch holds.
        count: how many batches of equal size to make, as far as the texts and the budget let it; by default each is
            filled before the next begins.

    Returns:
        One int64 index array a batch, longest texts first (the largest allocation comes first, and texts of equal
        length, which attention runs as one call, sit together). Every index occurs once.

    Raises:
        ValueError: the budget is not positive.
    """
    _check_budget(token_budget)
    sizes = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-sizes, kind="stable")
    share = sizes.sum() / count if count else float("inf")
    batches, first, start, tokens = [], 0, 0, 0  # tokens before the batch at hand, and with it
    for position, size in enumerate(sizes[order].tolist()):
        nearer_without = tokens + size / 2 > share * (len(batches) + 1)
        if position > first and (tokens + size - start > token_budget or nearer_without):
            batches.append(order[first:position])
            first, start = position, tokens
        tokens += size
    return [*batches, order[first:]] if len(order) else []


def _check_budget(token_budget: int) -> None:
    if token_budget < 1:
        raise ValueError(f"token_budget={token_budget} is not positive: pass the tokens a forward pass may hold")
