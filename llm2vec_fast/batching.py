"""Which texts share a forward pass: batches by a token budget, texts of near-equal length together."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import numpy as np
import torch

# A batch a core, SmolLM2-135M: throughput is flat from 1,000 to 2,000 tokens, where a layer's activations stay in
# cache, and falls on both sides. A GPU wants enough rows to fill its multiprocessors.
CPU_TOKEN_BUDGET = 2048
GPU_TOKEN_BUDGET = 32768


def default_token_budget(device: torch.device | str) -> int:
    """Tokens a forward pass holds unless the user says otherwise."""
    return CPU_TOKEN_BUDGET if torch.device(device).type == "cpu" else GPU_TOKEN_BUDGET


def even_budget(tokens: int, token_budget: int, workers: int) -> int:
    """The budget, at most ``token_budget``, with which ``tokens`` fill every worker equally often.

    Without it the last round would leave workers idle: 3 batches on 2 cores take as long as 4.

    Raises:
        ValueError: the budget is not positive.
    """
    _check_budget(token_budget)
    if workers == 1 or tokens == 0:
        return token_budget
    rounds = ceil(tokens / (token_budget * workers))
    return ceil(tokens / (rounds * workers))


def plan_batches(lengths: Sequence[int], token_budget: int) -> list[np.ndarray]:
    """Cut texts into batches of at most ``token_budget`` tokens; a longer text gets a batch of its own.

    A pure function of its arguments, so a run repeated is a run with the same batches.

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
