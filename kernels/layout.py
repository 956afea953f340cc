"""Which rows of a batch form one sequence: the one description that packed and padded batches share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class SequenceLayout:
    """Sequence ``i`` occupies rows ``starts[i] : starts[i] + lengths[i]`` of a batch flattened to ``total`` rows.

    A packed batch has no other rows. A padded batch (B, S) seen as B·S rows has rows that belong to no sequence;
    operations write zeros there. Build it once a forward pass, never inside a layer.

    Attributes:
        starts: (N,) int32, first row of each sequence.
        lengths: (N,) int32, tokens of each sequence; zero is allowed.
        max_length: the longest sequence, in tokens.
        total: rows of the flattened batch, padding included.
        padded_shape: (B, S) of a padded batch, None for a packed one.
    """

    starts: Tensor
    lengths: Tensor
    max_length: int
    total: int
    padded_shape: tuple[int, int] | None = None

    @classmethod
    def from_lengths(cls, lengths: Sequence[int] | Tensor, device: torch.device | str | None = None) -> SequenceLayout:
        """Packed sequences, one after the other, with no row between them.

        Raises:
            ValueError: a length is negative, or they are no integers.
        """
        if isinstance(lengths, Tensor):
            device = device if device is not None else lengths.device
            given = lengths.detach().cpu()
        else:
            device = device if device is not None else torch.get_default_device()
            given = torch.tensor(list(lengths), device="cpu")
        host = given.long()
        if host.ndim != 1:
            raise ValueError(f"lengths has shape {tuple(host.shape)}: pass one length a sequence, shape (N,)")
        if given.is_floating_point() and given.numel():
            raise ValueError(f"lengths has dtype {given.dtype}: pass token counts, integers")
        if host.numel() and int(host.min()) < 0:
            raise ValueError(f"lengths has the negative value {int(host.min())}: pass token counts of 0 or more")
        ends = host.cumsum(0)
        return cls(
            starts=(ends - host).to(torch.int32).to(device),
            lengths=host.to(torch.int32).to(device),
            max_length=int(host.max()) if host.numel() else 0,
            total=int(ends[-1]) if host.numel() else 0,
        )

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor) -> SequenceLayout:
        """Packed sequences from cumulative lengths (N + 1,), the flash-attention convention: 0, n₀, n₀ + n₁, …

        Raises:
            ValueError: it is empty, does not start at 0, or decreases.
        """
        if cu_seqlens.ndim != 1 or cu_seqlens.numel() == 0 or int(cu_seqlens[0]) != 0:
            raise ValueError("cu_seqlens must be one-dimensional and start at 0: 0, n0, n0 + n1, …")
        return cls.from_lengths(cu_seqlens.diff(), device=cu_seqlens.device)

    @classmethod
    def from_attention_mask(cls, attention_mask: Tensor) -> SequenceLayout:
        """Padded sequences from a 2-D mask (B, S), non-zero on real tokens; padding left, right, both or none.

        Raises:
            ValueError: the mask is not 2-D, or a row has padding between two real tokens.
        """
        if attention_mask.ndim != 2:
            raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}: pass a 2-D mask (batch, length)")
        batch, width = attention_mask.shape
        real = attention_mask != 0
        lengths = real.sum(1)
        if width == 0:
            starts = lengths
        else:
            first = real.int().argmax(1)
            last = width - 1 - real.flip(1).int().argmax(1)
            holes = (lengths > 0) & (last - first + 1 != lengths)
            if bool(holes.any()):
                row = int(holes.nonzero()[0, 0])
                raise ValueError(
                    f"attention_mask row {row} has padding between real tokens: remove those tokens or pack the batch"
                )
            starts = first + torch.arange(batch, device=real.device) * width
        return cls(
            starts=starts.to(torch.int32),
            lengths=lengths.to(torch.int32),
            max_length=int(lengths.max()) if batch else 0,
            total=batch * width,
            padded_shape=(batch, width),
        )

    @classmethod
    def from_position_ids(cls, position_ids: Tensor) -> SequenceLayout:
        """Packed sequences from position ids (1, T) or (T,): a sequence starts wherever the position is 0.

        Raises:
            ValueError: more than one row, or the first position is not 0.
        """
        flat = position_ids.reshape(-1)
        if position_ids.ndim > 2 or (position_ids.ndim == 2 and position_ids.shape[0] != 1):
            raise ValueError(f"position_ids has shape {tuple(position_ids.shape)}: packed batches are (1, tokens)")
        if flat.numel() and int(flat[0]) != 0:
            raise ValueError(f"position_ids starts at {int(flat[0])}: the first packed sequence must start at 0")
        starts = (flat == 0).nonzero().flatten()
        ends = torch.cat([starts[1:], starts.new_tensor([flat.numel()])]) if starts.numel() else starts
        return cls.from_lengths(ends - starts)

    @classmethod
    def from_shape(cls, batch: int, length: int, device: torch.device | str | None = None) -> SequenceLayout:
        """A dense batch (B, S): B sequences of S tokens, no padding."""
        return cls(
            starts=torch.arange(batch, dtype=torch.int32, device=device) * length,
            lengths=torch.full((batch,), length, dtype=torch.int32, device=device),
            max_length=length if batch else 0,
            total=batch * length,
            padded_shape=(batch, length),
        )

    def __len__(self) -> int:
        return self.lengths.shape[0]

    def __repr__(self) -> str:
        kind = "packed" if self.padded_shape is None else f"padded {self.padded_shape}"
        return f"SequenceLayout({kind}, {len(self)} sequences, {self.total} rows, longest {self.max_length})"

    @property
    def device(self) -> torch.device:
        return self.lengths.device

    def to(self, device: torch.device | str) -> SequenceLayout:
        """The same layout with its tensors on ``device``."""
        return SequenceLayout(
            self.starts.to(device), self.lengths.to(device), self.max_length, self.total, self.padded_shape
        )

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """(N + 1,) int32 cumulative lengths of the sequences, as flash-attention wants them for packed batches."""
        zero = self.lengths.new_zeros(1)
        return torch.cat([zero, self.lengths.cumsum(0, dtype=torch.int32)])

    @property
    def sequence_ids(self) -> Tensor:
        """(total,) int64: which sequence each row belongs to, −1 on padding rows. Made anew at each access.

        No step has a size that depends on values, so that torch.compile takes it whole.
        """
        starts, lengths = self.starts.long(), self.lengths.long()
        rows = torch.arange(self.total, device=self.device)
        order = (2 * starts + (lengths > 0)).argsort()  # an empty sequence never hides the one that starts with it
        last = torch.searchsorted(starts[order], rows, right=True) - 1
        ids = order[last.clamp(min=0)]
        return torch.where((last >= 0) & (rows < starts[ids] + lengths[ids]), ids, -1)

    @cached_property
    def rows(self) -> Tensor:
        """(tokens,) int64: the rows that hold a token, sequence by sequence."""
        lengths = self.lengths.long()
        sequence = torch.arange(len(self), device=self.device).repeat_interleave(lengths)
        within = torch.arange(sequence.shape[0], device=self.device) - (lengths.cumsum(0) - lengths)[sequence]
        return self.starts.long()[sequence] + within

    @property
    def position_ids(self) -> Tensor:
        """(total,) int64: position of each row within its sequence, 0 on padding rows. Made anew at each access."""
        ids = self.sequence_ids
        positions = torch.arange(self.total, device=self.device) - self.starts.long()[ids.clamp(min=0)]
        return torch.where(ids >= 0, positions, 0)
