"""The progress line counts what is done and foretells what is left."""

from __future__ import annotations

import pytest

from llm2vec_fast.bulk.progress import Meter, ProgressLine, duration


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_rate_padding_and_eta_come_from_tokens() -> None:
    clock = Clock()
    meter = Meter(total_bytes=1000, clock=clock)
    assert meter.line() == "0 rows · 0 tokens/s · 0.0% padding · ETA …"
    meter.begin_shard(characters=6000, input_bytes=200, bad_rows=1)
    clock.now += 2
    meter.batch(rows=10, tokens=300, padded_tokens=400)
    # no part is finished: 6,000 characters in 200 bytes foretell 7,500 tokens in 1,000; 7,200 are left
    assert meter.line() == "10 rows · 150 tokens/s · 25.0% padding · 1 left out · ETA 0:00:48"
    clock.now += 2
    meter.batch(rows=10, tokens=500, padded_tokens=500)
    meter.end_shard()
    # 200 bytes were 800 tokens: the other 800 bytes are 3,200 tokens, at 200 a second
    assert meter.eta_seconds == pytest.approx(16)


def test_long_texts_first_do_not_lengthen_the_eta() -> None:
    clock = Clock()
    meter = Meter(total_bytes=1000, done_bytes=500, done_tokens=1000, clock=clock)
    meter.begin_shard(characters=4000, input_bytes=500, bad_rows=0)
    clock.now += 1
    meter.batch(rows=1, tokens=500, padded_tokens=500)
    assert meter.eta_seconds == pytest.approx(1.0)


def test_what_an_earlier_run_did_counts_as_done_but_not_as_speed() -> None:
    clock = Clock()
    meter = Meter(total_bytes=1000, done_bytes=800, done_tokens=400, rows=80, clock=clock)
    meter.begin_shard(characters=200, input_bytes=100, bad_rows=0)
    clock.now += 1
    meter.batch(10, 50, 50)
    meter.end_shard()
    assert meter.rows == 90
    assert meter.eta_seconds == pytest.approx(1.0)


def test_the_rate_follows_the_last_half_minute() -> None:
    clock = Clock()
    meter = Meter(total_bytes=1000, clock=clock)
    meter.begin_shard(1000, 500, 0)
    for tokens in [1000] * 100 + [10] * 100:
        clock.now += 1
        meter.batch(1, tokens, tokens)
    assert meter.tokens_per_second == pytest.approx(10)


def test_without_a_terminal_there_is_a_plain_line_every_ten_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    meter = Meter(total_bytes=1000, clock=clock)
    meter.begin_shard(100, 1000, 0)
    with ProgressLine(meter) as progress:
        for _ in range(25):
            clock.now += 1
            meter.batch(1, 10, 10)
            progress.update()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" · ")[0] for line in lines] == ["10 rows", "20 rows"]


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.4, "0:00:00"), (3599.6, "1:00:00"), (86399, "23:59:59"), (183_845, "2 d 03:04:05")]
)
def test_durations_read_well(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown
