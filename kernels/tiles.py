"""Which tiles of which sequences a kernel works on: exactly the programs that are needed, longest sequence first."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .once import once_a_layout

FIELDS = 5
PADDED_TO = 128


@dataclass(frozen=True)
class TileTable:
    """One program a row.

    Attributes:
        rows: (tiles, FIELDS) int32 on the layout's device: sequence number, first position of the tile within the
            sequence, first row of the sequence in the batch, tokens of the sequence, and where the sequence starts in a
            buffer that pads each one to a multiple of PADDED_TO (the same in tables of every block size).
        count: tiles.
        tokens: rows of the batch that belong to a sequence.
        padded_rows: length of such a buffer.
    """

    rows: Tensor
    count: int
    tokens: int
    padded_rows: int


@once_a_layout
def tile_table(starts: Tensor, lengths: Tensor, block: int) -> TileTable:
    """The tiles of ``block`` positions of every sequence; made once for a pair of tensors, however many layers ask.

    Tiles of one sequence lie next to each other, so that programs that run together read the same keys; the longest
    sequences come first, so that no long program starts last. It reads the lengths on the host: one synchronisation.
    """
    host_starts, host_lengths = torch.stack([starts, lengths]).to("cpu", torch.int64)
    order = host_lengths.argsort(descending=True, stable=True)
    tiles = (host_lengths[order] + block - 1) // block
    padded = (host_lengths[order] + PADDED_TO - 1) // PADDED_TO * PADDED_TO
    sequence = order.repeat_interleave(tiles)
    position = (
        torch.arange(sequence.shape[0], device="cpu") - (tiles.cumsum(0) - tiles).repeat_interleave(tiles)
    ) * block
    padded_start = (padded.cumsum(0) - padded).repeat_interleave(tiles)
    rows = torch.stack([sequence, position, host_starts[sequence], host_lengths[sequence], padded_start], dim=1)
    return TileTable(
        rows.to(lengths.device, torch.int32), sequence.shape[0], int(host_lengths.sum()), int(padded.sum())
    )
