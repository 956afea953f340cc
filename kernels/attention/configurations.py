"""One hand-picked launch configuration a kernel, head size, dtype and architecture: nothing is tuned at run time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from functools import cache, partial

import torch
from torch import Tensor

MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class Configuration:
    """How a kernel is launched.

    Attributes:
        block_q, block_k: tile sizes in rows.
        warps: of a program.
        stages: of the software pipeline.
        described: the loop copies its tiles by tensor descriptor (TMA) rather than by pointers.
        split: a head size that is no power of two is split into two blocks of columns (80 = 64 + 16), where that
            wastes less than padding it to one (128).
        tail: with pointers, and where no tile but the last is masked: that one comes first, so many rows a step. It
            takes fewer registers, and rounds the length of a short text up by less. 0: one step, last.
        together: with descriptors, both tiles of a step arrive at one barrier, not each at its own. That takes fewer
            instructions, but mostly more registers, and the second tile must be there before the first product.
        folded: backward, without dropout: dO·Vᵀ starts from minus delta rather than from zero. mma.sync takes that for
            nothing, and a subtraction of each element is saved.
    """

    block_q: int
    block_k: int
    warps: int
    stages: int
    described: bool = False
    split: bool = False
    tail: int = 0
    together: bool = False
    folded: bool = False

    def widths(self, head_dim: int) -> tuple[int, int]:
        """The columns of a tile's one or two blocks (0: one), each a power of two that a matrix instruction takes."""
        padded = block_d(head_dim)
        first = 1 << (head_dim.bit_length() - 1)
        rest = block_d(head_dim - first) if head_dim > first else 0
        return (first, rest) if self.split and first >= 16 and first + rest < padded else (padded, 0)

    def arguments(self, head_dim: int) -> dict[str, int]:
        """As a kernel's launch takes them, by name."""
        width, rest = self.widths(head_dim)
        return {
            "BLOCK_Q": self.block_q,
            "BLOCK_K": self.block_k,
            "BLOCK_T": self.tail,
            "BLOCK_D": width,
            "BLOCK_E": rest,
            "DESCRIBED": self.described * (1 + self.together),
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


def block_d(head_dim: int) -> int:
    """The head size as one block of columns: a power of two that a matrix instruction takes."""
    return max(16, 1 << (head_dim - 1).bit_length())


class Demand(Enum):
    """What a rule asks of a kernel beside the products, by the registers it takes."""

    PLAIN = 0
    RULED = 1  # masked tiles in the middle, or capped logits
    DROPOUT = 2


# Chosen from what `make codegen` finds in the machine code, without timings: no spilled registers first, then the
# fewest instructions a FLOP in the inner loop (wi/MF, lower is better; the comments give it). Tables are by tile width
# (up to 64, 128 and 256), each row by demand: plain, ruled, dropout.
#
# On sm_90 what is left beside products and softmax are uniform instructions (UMOV, UIADD3) that hold the operands of
# wgmma and the coordinates of copies: for 128, 61 of 512 in the forward loop, 97 of 354 for dK and dV, 93 of 467 for
# dQ. On sm_80 it is loading fragments (48 LDSM beside 64 HMMA of 185 for dK and dV of 128): Triton puts the loads
# of K and V back into the loop, also where their fragments would fit into registers. Loops unrolled twice: dQ of
# 64 on sm_90 548 rather than 567; dQ of 128, and dK and dV of 128 on sm_90, then spill in the loop.
_C = Configuration
_F = partial(Configuration, folded=True)
_T = partial(Configuration, described=True, together=True)
# Figures for 64 and 128. Descriptors with three coordinates instead of the ragged ones' five, which only full tiles
# could use, give 887, 486 forward, 348 for dK and dV of 128, 547, 296 for dQ: not worth a second one of every tensor.
_DESCRIBED: dict[str, dict[int, tuple[Configuration, ...]]] = {
    # Plain 893, 488; not together 919, 503. Not together either: 128×64 with 4 warps: 1015, 603 and 8 bytes spilled.
    # 64×128: 912, 505, but each key is read from L2 twice as often. Dropout at 128×128 spills 36 bytes.
    "forward": {
        64: (_T(128, 128, 8, 2), _C(128, 128, 8, 2, True), _C(128, 64, 8, 2, True)),
        128: (_T(128, 128, 8, 2), _C(128, 128, 8, 2, True), _C(128, 64, 8, 2, True)),
        256: (_C(128, 64, 8, 2, True), _C(128, 64, 8, 2, True), _C(128, 32, 8, 2, True)),
    },
    # Plain 523, 338. For 64: folded 528 and 144 bytes spilled, together 533 and 116, minus delta added instead of delta
    # subtracted 511 and 16. For 128: not folded 352, not together either 375; not folded, lse and delta as one load of
    # 8 bytes: 342 and 24 bytes. Neither: 64×64: 662 for 64; 128×64: 304 bytes spilled for 128; 32×64: 561; 3 stages:
    # 400. For 256, causal, 16×64 spills 428 bytes, of which some in the loop, 32×32 none: 989, by mma.sync, for wgmma
    # takes 64 keys; with every rule that spills 156.
    "backward_keys": {
        64: (_C(128, 64, 4, 2, True), _C(64, 64, 4, 2, True), _C(32, 64, 4, 2, True)),
        128: (_T(64, 64, 4, 2, folded=True), _C(64, 64, 8, 2, True), _C(16, 64, 8, 2, True)),
        256: (_C(16, 64, 8, 2, True), _C(32, 32, 8, 2, True), _C(16, 32, 8, 2, True)),
    },
    # Plain 557, 297; not together 567, 302. 64×128 with 4 warps: 544, 296, with twice the reads of keys; 64×64: 704,
    # 404. Q as a value that is no load's, for registers: Triton fetches it from shared memory at each step, 554, 292.
    "backward_queries": {
        64: (_T(128, 128, 8, 2), _C(128, 64, 8, 2, True), _C(128, 64, 8, 2, True)),
        128: (_T(128, 128, 8, 2), _C(128, 64, 8, 2, True), _C(128, 64, 8, 2, True)),
        256: (_C(64, 32, 8, 2, True), _C(64, 32, 8, 2, True), _C(64, 32, 8, 2, True)),
    },
}
_POINTERS: dict[str, dict[int, tuple[Configuration, ...]]] = {
    # Plain 1154, 873. For 128 without the tail first: 144 bytes spilled; 128×64: 963 and 72 bytes. For 64 with dropout
    # 2392; 128×64: 2850, and with Triton 3.6 204 bytes spilled where every rule is asked for.
    "forward": {
        64: (_C(128, 128, 8, 2), _C(128, 128, 8, 2), _C(64, 64, 8, 2)),
        128: (_C(128, 128, 8, 2, tail=16), _C(128, 32, 8, 2), _C(128, 32, 8, 2)),
        256: (_C(64, 32, 8, 2), _C(64, 32, 8, 2), _C(64, 32, 8, 2)),
    },
    # Plain 782, 706. For 64: not folded 835, 32×128 with 8 warps: 835, 32×256: 731 and 92 bytes spilled, 64×64 with 8
    # warps: 788 and 40, 64×128: 786 and 48, the tail as a branch rather than a loop: 767 and 16. For 128: not folded
    # 740, 32×128: 685 and 140 bytes, 64×64: 744, 32×64: 809, with 4 warps 732 and 32; with the tail first 112 spills 8;
    # 3 stages, not folded: 851. Pointers carried through the loop rather than positions: 694 for 128, 782 for 64 (771
    # and 8 bytes without the tail first). Loops unrolled twice: 729 and 28 bytes for 128. A row's numbers side by side
    # in memory: the same, but on sm_90 413 rather than 375, and 8 bytes. For 256, causal, 16×64: 716 and 24 bytes not
    # folded, 32×32: 765; with every rule 16×64: 1469 and 144 bytes, 16×32: 1596.
    "backward_keys": {
        64: (_F(16, 128, 4, 2, tail=16), _F(32, 64, 8, 2), _C(16, 64, 4, 2)),
        128: (_F(16, 128, 8, 2), _F(32, 64, 8, 2), _C(16, 64, 8, 2)),
        256: (_F(16, 64, 8, 2), _F(32, 32, 8, 2), _C(16, 32, 8, 2)),
    },
    # Plain 781, 651; not folded 854, 692, and so: 128×64 with 4 warps: 841 and 132 bytes spilled for 64, 3 stages: 971;
    # 128×64: 662 and 68 bytes for 128, 64×64 with 4 warps: 745, a tail of 16 first: 707.
    "backward_queries": {
        64: (_F(128, 64, 8, 2, tail=32), _F(128, 64, 8, 2), _C(128, 32, 8, 2)),
        128: (_F(128, 32, 8, 2), _F(128, 32, 8, 2), _C(64, 32, 8, 2)),
        256: (_F(64, 16, 8, 2), _F(64, 16, 8, 2), _C(64, 16, 8, 2)),
    },
}
# Instead of those above. Logits come from tensor memory all at once on sm_100: for 64, 128×64 spills 232 bytes, and
# 64×64 with 4 warps 192 where it is causal; for 128, 64×64 with 2 stages 48; for 256, 16×64 with 2 stages 980.
_DESCRIBED_ON_SM_100: dict[tuple[str, int], tuple[Configuration, ...]] = {
    ("backward_keys", 64): (_C(64, 64, 4, 2, True), _C(64, 64, 8, 2, True), _C(64, 64, 8, 2, True)),
    ("backward_keys", 128): (_C(64, 64, 4, 3, True), _C(32, 64, 8, 2, True), _C(16, 64, 8, 1, True)),
    ("backward_keys", 256): (_C(32, 64, 8, 1, True), _C(32, 64, 8, 1, True), _C(16, 64, 8, 1, True)),
    ("backward_queries", 128): (_C(128, 128, 8, 2, True), _C(128, 64, 8, 2, True), _C(64, 64, 8, 2, True)),
}
_POINTERS_ON_SM_100: dict[tuple[str, int], tuple[Configuration, ...]] = {
    ("backward_keys", 128): (_C(16, 64, 8, 2), _C(16, 64, 8, 2), _C(16, 64, 8, 1)),
    ("backward_queries", 128): (_C(128, 32, 8, 2), _C(128, 32, 8, 2), _C(64, 32, 8, 2)),
}
# Where sm_90 must read by pointers, its wgmmas keep more in registers: smaller tiles.
_POINTERS_WGMMA: dict[str, dict[int, tuple[Configuration, ...]]] = {
    "forward": {
        64: (_C(128, 64, 8, 2),) * 3,
        128: (_C(128, 64, 8, 2), _C(128, 64, 8, 2), _C(128, 32, 8, 2)),
        256: (_C(64, 32, 8, 2),) * 3,
    },
    # For 128 with dropout 32×64 spills 72 bytes; for 256 16×64 spills 428.
    "backward_keys": {
        64: (_C(32, 64, 4, 2),) * 3,
        128: (_C(32, 64, 8, 2), _C(32, 64, 8, 2), _C(16, 64, 8, 2)),
        256: (_C(16, 32, 8, 2), _C(16, 32, 8, 2), _C(16, 16, 8, 2)),
    },
    "backward_queries": {
        64: (_C(128, 64, 8, 2), _C(128, 64, 8, 2), _C(128, 32, 8, 2)),
        128: (_C(128, 32, 8, 2),) * 3,
        256: (_C(64, 16, 8, 2),) * 3,
    },
}
# 64 KiB of shared memory a block, waves of 64: four warps, tiles of 64 keys or fewer.
_AMD: dict[str, dict[int, tuple[Configuration, ...]]] = {
    "forward": {
        64: (_C(128, 64, 4, 1),) * 3,
        128: (_C(128, 32, 4, 1),) * 3,
        256: (_C(64, 32, 4, 1),) * 3,
    },
    "backward_keys": {
        64: (_C(32, 64, 4, 1),) * 3,
        128: (_C(32, 64, 4, 1),) * 3,
        256: (_C(16, 32, 4, 1),) * 3,
    },
    "backward_queries": {
        64: (_C(64, 64, 4, 1),) * 3,
        128: (_C(64, 32, 4, 1),) * 3,
        256: (_C(32, 16, 4, 1),) * 3,
    },
}
# float32 products use no tensor core (unless TF32 is allowed): every element of a tile passes through registers.
# Forward and dQ take equal tiles, so that they compute equal scores to the last bit: weights then add up to 1 in both,
# whatever a score of 10,000 has lost by rounding.
_FLOAT32: dict[str, dict[int, tuple[Configuration, ...]]] = {
    "forward": {64: (_C(16, 32, 4, 1),) * 3, 128: (_C(16, 16, 8, 1),) * 3, 256: (_C(16, 16, 8, 1),) * 3},
    "backward_keys": {64: (_C(16, 32, 4, 1),) * 3, 128: (_C(16, 16, 8, 1),) * 3, 256: (_C(16, 16, 8, 2),) * 3},
    "backward_queries": {64: (_C(16, 32, 4, 1),) * 3, 128: (_C(16, 16, 4, 1),) * 3, 256: (_C(16, 16, 8, 1),) * 3},
}
# Instead of those above with Triton 3.6, which keeps more in registers: for float32, for what sm_90 reads by
# descriptor, and for what is read by pointers, where it copies the folded numbers one by one. Behind each what it gives
# there, and in brackets what the choice above gives there.
_ON_OLD_TRITON: dict[tuple[str, str, int, Demand], Configuration] = {
    ("sm_90", "forward", 256, Demand.RULED): _C(64, 64, 8, 2, True),  # causal 595 (416, 96 bytes spilled)
    ("sm_90", "forward", 256, Demand.DROPOUT): _C(64, 64, 8, 2, True),  # every rule 1488 (1520, 32 bytes)
    ("sm_90", "backward_keys", 64, Demand.RULED): _C(64, 128, 8, 2, True),  # window 689 (671, 16 bytes spilled)
    ("sm_90", "backward_keys", 64, Demand.DROPOUT): _C(32, 128, 8, 2, True),  # every rule 2865 (2800, 8 bytes)
    ("sm_90", "backward_keys", 128, Demand.PLAIN): _T(32, 64, 4, 2, folded=True),  # 509 (319, 24 bytes spilled)
    ("sm_90", "backward_keys", 128, Demand.RULED): _C(32, 64, 4, 2, True),  # window 534 (615 with 8 warps, 8 bytes)
    ("sm_90", "backward_queries", 128, Demand.DROPOUT): _C(64, 64, 8, 2, True),  # every rule 1611 (1425, 44 bytes)
    ("pointers", "backward_keys", 64, Demand.RULED): _C(32, 64, 8, 2),  # causal 900 (1087, 40 bytes spilled)
    ("pointers", "backward_keys", 128, Demand.PLAIN): _C(16, 128, 8, 2, tail=16),  # 767 (790)
    ("float32", "forward", 64, Demand.PLAIN): _C(16, 32, 8, 1),  # (12 bytes on sm_80)
    ("float32", "forward", 64, Demand.RULED): _C(16, 32, 8, 1),
    ("float32", "forward", 64, Demand.DROPOUT): _C(16, 16, 8, 1),  # (16 bytes on sm_80; 16×32, 8 warps: 24 on sm_90)
    ("float32", "backward_queries", 64, Demand.DROPOUT): _C(16, 16, 8, 1),  # as forward
    ("float32", "backward_keys", 64, Demand.DROPOUT): _C(16, 32, 8, 1),  # (44 bytes on sm_90)
    ("float32", "backward_keys", 128, Demand.DROPOUT): _C(16, 16, 8, 2),  # 8 bytes on sm_90 (32)
}


def forward(head_dim: int, dtype: torch.dtype, architecture: str, describable: bool, demand: Demand) -> Configuration:
    """How the forward kernel is launched for a head size, dtype and architecture ("sm_80", "sm_90", "gfx942", …).

    ``describable``: whether the tensors that its loop reads can be copied by descriptor.
    """
    return _choose("forward", head_dim, dtype, architecture, describable, demand)


def backward_keys(
    head_dim: int, dtype: torch.dtype, architecture: str, describable: bool, demand: Demand
) -> Configuration:
    """How the dK and dV kernel is launched."""
    return _choose("backward_keys", head_dim, dtype, architecture, describable, demand)


def backward_queries(
    head_dim: int, dtype: torch.dtype, architecture: str, describable: bool, demand: Demand
) -> Configuration:
    """How the dQ kernel is launched."""
    return _choose("backward_queries", head_dim, dtype, architecture, describable, demand)


@cache
def _choose(
    kernel: str, head_dim: int, dtype: torch.dtype, architecture: str, describable: bool, demand: Demand
) -> Configuration:
    width = max(64, block_d(head_dim))
    table = _table(dtype, architecture, describable)
    row = table[kernel][width]
    if architecture.startswith("sm_100") and table is not _FLOAT32:
        row = (_DESCRIBED_ON_SM_100 if table is _DESCRIBED else _POINTERS_ON_SM_100).get((kernel, width), row)
    config = row[demand.value]
    if _old_triton() and table is not _POINTERS_WGMMA:
        place = "float32" if table is _FLOAT32 else "pointers" if table is _POINTERS else architecture
        config = _ON_OLD_TRITON.get((place, kernel, width, demand), config)
    return replace(config, split=table is not _FLOAT32 and block_d(head_dim) > 64)


def _table(dtype: torch.dtype, architecture: str, describable: bool) -> dict[str, dict[int, tuple[Configuration, ...]]]:
    if dtype == torch.float32:
        return _FLOAT32
    if architecture.startswith("gfx"):
        return _AMD
    if architecture.startswith(("sm_90", "sm_100")):  # sm_120 has too little shared memory for these tiles
        return _DESCRIBED if describable else _POINTERS_WGMMA
    return _POINTERS


def _old_triton() -> bool:
    """Whether the compiler is one that keeps more in registers; 3.6 was measured, 3.9 is new enough."""
    import triton  # where it is missing, no configuration is asked for

    return tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)


def sums_like(q: Tensor) -> Tensor:
    """What the forward kernel leaves for the backward ones, for q (T, Hq, D): a new (1 or 3, Hq, T) float32.

    First each row's log-sum-exp to base 2. Of float32 inputs also the two that it is made of, for their sum rounds away
    what the gradients need where logits are large: the largest score, and the sum of weights relative to that one's.
    """
    return q.new_empty((3 if q.dtype == torch.float32 else 1, q.shape[1], q.shape[0]), dtype=torch.float32)
