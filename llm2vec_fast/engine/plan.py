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
# Batches of about the same size, as many as a multiple of this: even for each number of cores that divides it.
_SHARES = (16, 8, 4, 2)


def default_token_budget(device: torch.device | str) -> int:
    """Tokens a forward pass holds unless the user says otherwise."""
    return CPU_TOKEN_BUDGET if torch.device(device).type == "cpu" else GPU_TOKEN_BUDGET


def even_budget(tokens: int, token_budget: int) -> int:
    """The budget, at most ``token_budget``, with which a CPU's cores, however many, come out about even.

    Without it the last round would leave cores idle: 3 batches on 2 cores take as long as 4. The most shares are made
    that leave a batch CPU_LEAST_TOKENS (or the whole budget, where that is less).

    Raises:
        ValueError: the budget is not positive.
    """
    _check_budget(token_budget)
    least = min(CPU_LEAST_TOKENS, token_budget)
    shares = next((n for n in _SHARES if tokens >= n * least), 1)
    rounds = ceil(tokens / (token_budget * shares))
    return max(1, ceil(tokens / (rounds * shares))) if tokens else token_budget


def plan_batches(lengths: Sequence[int], token_budget: int) -> list[np.ndarray]:
    """Cut texts into batches of at most ``token_budget`` tokens; a longer text gets a batch of its own.

    Args:
        lengths: tokens of each text.
        token_budget: the most tokens a batch holds.

    Returns:
        One int64 index array a batch, longest texts first (the largest allocation comes first, and texts of equal
        length, which attention runs as one call, sit together). Every index occurs once.

    Raises:
        ValueError: the budget is not positive.
    """
    _check_budget(token_budget)
    sizes = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-sizes, kind="stable")
    batches, first, tokens = [], 0, 0
    for position, size in enumerate(sizes[order].tolist()):
        if position > first and tokens + size > token_budget:
            batches.append(order[first:position])
            first, tokens = position, 0
        tokens += size
    return [*batches, order[first:]] if len(order) else []


def _check_budget(token_budget: int) -> None:
    if token_budget < 1:
        raise ValueError(f"token_budget={token_budget} is not positive: pass the tokens a forward pass may hold")
