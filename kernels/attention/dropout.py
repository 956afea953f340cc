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
# In the first rounds a word depends on part of the counter only, and is held in that part's shape.
_ROUNDS_IN_PARTS = 3
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Dropout:
    """Dropout with probability ``threshold`` / 65536; weights that stay are scaled up by ``gain``."""

    threshold: int
    seed: int

    @property
    def gain(self) -> float:
        """What weights that stay are multiplied by."""
        return gain_of(self.threshold)

    def factors(self, sequences: Tensor, heads: Tensor, queries: Tensor, first_key: int, last_key: int) -> Tensor:
        """(n, h, q, last_key − first_key) float32: 0 where dropped, `gain` where kept; the first three are int64."""
        shaped = sequences[:, None, None, None], heads[:, None, None], queries[:, None]
        return self.kept(*shaped, first_key, last_key).float() * -self.gain

    def kept(self, sequences: Tensor, heads: Tensor, queries: Tensor, first_key: int, last_key: int) -> Tensor:
        """(…, last_key − first_key) int16: −1 where a weight stays, else 0; for int64 that broadcast to (…, 1)."""
        words = torch.arange(first_key // KEYS_A_COUNTER, -(-last_key // KEYS_A_COUNTER), device=queries.device)
        random = _philox((queries, words, heads, sequences), (self.seed & _MASK, self.seed >> 32 & _MASK))
        # PyTorch compares 16-bit numbers slowly, but bounds them fast, as signed ones: to the last that is dropped or
        # the first that stays.
        last_dropped = self.threshold - 1 - LEVELS // 2
        kept = random.bitwise_xor_(-LEVELS // 2).clamp_(last_dropped, last_dropped + 1).neg_().add_(last_dropped)
        skipped = first_key % KEYS_A_COUNTER
        return kept[..., skipped : skipped + last_key - first_key]


def drop_(weights: Tensor, kept: Tensor) -> Tensor:
    """Zero what of ``weights`` is not ``kept``, in place: by its bits, which is faster than any function of PyTorch."""
    integers = _INTEGERS[weights.element_size()]
    weights.view(integers).view(kept.shape).bitwise_and_(kept.to(integers))
    return weights


def threshold_of(probability: float) -> int:
    """The dropout probability in 65536ths, which is how finely it is kept; at least one unless it is 0."""
    return min(max(round(probability * LEVELS), int(probability > 0)), LEVELS - 1)


def gain_of(threshold: int) -> float:
    """1 / (1 − p): what is kept is multiplied by it, so that the mean stays."""
    return LEVELS / (LEVELS - threshold)


def _philox(counter: tuple[Tensor, ...], key: tuple[int, int]) -> Tensor:
    """(…, 8 · n) int16 from a counter of four, int64, which broadcast to (…, n), and a key of two.

    Of each 32-bit word the low half comes first.
    """
    keys = [tuple((k + i * step) & _MASK for k, step in zip(key, _KEY_STEPS, strict=True)) for i in range(ROUNDS)]
    c0, c1, c2, c3 = counter
    for k0, k1 in keys[:_ROUNDS_IN_PARTS]:
        # Products overflow int64, yet none of their 64 bits is lost.
        product_0, product_2 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = ((product_2 >> 32) ^ c1 ^ k0) & _MASK, ((product_0 >> 32) ^ c3 ^ k1) & _MASK
        c1, c3 = product_2, product_0
    c0, c1, c2, c3 = (x.contiguous() for x in torch.broadcast_tensors(c0, c1, c2, c3))
    high = torch.empty_like(c0)
    for k0, k1 in keys[_ROUNDS_IN_PARTS:]:
        product_0, product_2 = c0.mul_(_MULTIPLIERS[0]), c2.mul_(_MULTIPLIERS[1])
        c0 = c1.bitwise_xor_(torch.bitwise_right_shift(product_2, 32, out=high)).bitwise_xor_(k0).bitwise_and_(_MASK)
        c2 = c3.bitwise_xor_(torch.bitwise_right_shift(product_0, 32, out=high)).bitwise_xor_(k1).bitwise_and_(_MASK)
        c1, c3 = product_2, product_0
    pairs = c0.new_empty(*c0.shape, 2)
    torch.bitwise_or(c0, c1.bitwise_left_shift_(32), out=pairs[..., 0])
    torch.bitwise_or(c2, c3.bitwise_left_shift_(32), out=pairs[..., 1])
    return pairs.flatten(-2).view(torch.int16)
