"""How far a bulk job is: one live line on a terminal, a plain line now and then anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.live import Live

PLAIN_EVERY_SECONDS = 10.0
RECENT_SECONDS = 30.0  # the rate is that of the last half minute: an ETA should follow the corpus
CHARACTERS_PER_TOKEN = 4.0  # a guess, used until the first part of the folder is finished


@dataclass
class Meter:
    """Counts what is done. Bytes are those of the input files; they tell the tokens that are still to come.

    ``done_bytes``, ``done_tokens``, ``rows`` and ``bad_rows`` start with what finished parts hold.
    """

    total_bytes: int
    done_bytes: int = 0
    done_tokens: int = 0
    rows: int = 0
    bad_rows: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    clock: Callable[[], float] = time.monotonic
    _shard_bytes: int = 0
    _shard_characters: int = 0
    _shard_tokens: int = 0
    _started: float = field(init=False)
    _recent: list[tuple[float, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._started = self.clock()
        self._recent.append((self._started, 0))

    def begin_shard(self, characters: int, input_bytes: int, bad_rows: int) -> None:
        """The texts of a shard, ``characters`` in all, go to the encoder."""
        self._shard_characters, self._shard_bytes, self._shard_tokens = characters, input_bytes, 0
        self.bad_rows += bad_rows

    def batch(self, rows: int, tokens: int, padded_tokens: int) -> None:
        """A forward pass is done: ``padded_tokens`` counts every position the model computed, padding included."""
        self.rows += rows
        self.tokens += tokens
        self._shard_tokens += tokens
        self.padded_tokens += padded_tokens
        now = self.clock()
        self._recent.append((now, self.tokens))
        while len(self._recent) > 2 and self._recent[1][0] < now - RECENT_SECONDS:
            self._recent.pop(0)

    def end_shard(self) -> None:
        """Every text of the shard is embedded, or left out."""
        self.done_bytes += self._shard_bytes
        self.done_tokens += self._shard_tokens
        self._shard_bytes = self._shard_characters = self._shard_tokens = 0

    @property
    def seconds(self) -> float:
        return self.clock() - self._started

    @property
    def tokens_per_second(self) -> float:
        (start, before), (end, after) = self._recent[0], self._recent[-1]
        return (after - before) / (end - start) if end > start else 0.0

    @property
    def padding(self) -> float:
        """The share of computed positions that are padding, 0 to 1."""
        return 1.0 - self.tokens / self.padded_tokens if self.padded_tokens else 0.0

    @property
    def eta_seconds(self) -> float | None:
        """Seconds to go; None before the first batch.

        The tokens of a byte are those of whole parts: within one, the longest texts come first.
        """
        if not self.tokens_per_second:
            return None
        if self.done_tokens:
            tokens_a_byte = self.done_tokens / self.done_bytes
        elif self._shard_bytes:
            tokens_a_byte = self._shard_characters / CHARACTERS_PER_TOKEN / self._shard_bytes
        else:
            return None
        remaining = (self.total_bytes - self.done_bytes) * tokens_a_byte - self._shard_tokens
        return max(remaining, 0.0) / self.tokens_per_second

    def line(self) -> str:
        """ "12,345 rows · 1,234 tokens/s · 0.0 % padding · ETA 0:12:34"."""
        bad = f" · {self.bad_rows:,} left out" if self.bad_rows else ""
        eta = "…" if self.eta_seconds is None else duration(self.eta_seconds)
        return (
            f"{self.rows:,} rows · {self.tokens_per_second:,.0f} tokens/s · {self.padding:.1%} padding{bad} · ETA {eta}"
        )


class ProgressLine:
    """Shows a meter's line on stderr while the job runs."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._live: Live | None = None
        self._shown = meter.clock()

    def __enter__(self) -> ProgressLine:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(self, console=Console(stderr=True), refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def __rich__(self) -> str:
        return self._meter.line()

    def update(self) -> None:
        """Call after every batch."""
        now = self._meter.clock()
        if self._live is None and now - self._shown >= PLAIN_EVERY_SECONDS:
            self._shown = now
            print(self._meter.line(), file=sys.stderr, flush=True)


def counted(count: int, noun: str) -> str:
    """ "1 part", "2 parts"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def duration(seconds: float) -> str:
    """ "0:12:34", or "2 d 03:04:05"."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{days} d {hour:02}:{minute:02}:{second:02}" if days else f"{hour}:{minute:02}:{second:02}"
