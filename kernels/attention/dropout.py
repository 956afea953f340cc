"""Which attention weights are dropped: a function of (seed, sequence, head, query, key), the same on every backend.

Counter-based, after Philox4x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), with the seven
rounds that its authors found enough. The counter is (query, key // 8, head, sequence), positions counted within the
sequence; its 128 bits serve eight neighbouring keys with 16 bits each. Packed or padded, forward or backward, whole or
in blocks, the same element is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDS = 7
KEYS_A_COUNTER = 8
LEVELS = 1 << 16
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


@dataclass(frozen=True)
class Dropout:
    """Dropout with probability ``threshold`` / 65536; weights that stay are scaled up."""

    threshold: int
    seed: int

    def factors(self, sequences: Tensor, heads: Tensor, queries: Tensor, first_key: int, last_key: int) -> Tensor:
        """(n, h, q, last_key − first_key) float32: 0 where dropped, `gain_of` where kept; the first three are int64."""
        words = torch.arange(first_key // KEYS_A_COUNTER, -(-last_key // KEYS_A_COUNTER), device=queries.device)
        random = _philox(
            (queries[:, None], words, heads[:, None, None], sequences[:, None, None, None]),
            (self.seed & _MASK, self.seed >> 32 & _MASK),
        )
        # (n, h, q, words, 4, 2): the low half of each 32-bit word, then the high half.
        halves = torch.stack([torch.stack([x & 0xFFFF, x >> 16], -1) for x in random], -2)
        kept = (halves >= self.threshold).flatten(-3)
        skipped = first_key % KEYS_A_COUNTER
        return kept[..., skipped : skipped + last_key - first_key].float() * gain_of(self.threshold)


def threshold_of(probability: float) -> int:
    """The dropout probability in 65536ths, which is how finely it is kept."""
    return min(round(probability * LEVELS), LEVELS - 1)


def gain_of(threshold: int) -> float:
    """1 / (1 − p): what is kept is multiplied by it, so that the mean stays."""
    return LEVELS / (LEVELS - threshold)


def _philox(counter: tuple[Tensor, ...], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Four 32-bit words, held in int64, from a counter of four and a key of two."""
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(ROUNDS):
        high_0, low_0 = _multiply(c0, _MULTIPLIERS[0])
        high_2, low_2 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high_2 ^ c1 ^ k0, low_2, high_0 ^ c3 ^ k1, low_0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def _multiply(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low half of a 32-bit product; in two 16-bit steps, for int64 would overflow."""
    low = x * (factor & 0xFFFF)
    high = x * (factor >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)
