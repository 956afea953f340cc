"""What is timed on a GPU: the work and nothing else, the cache flushed before, the median of several runs."""

import pytest
import torch

from benchmarks.gpu import timing
from benchmarks.gpu.timing import Clock, peak_extra_mib


class StubDevice:
    """Keeps a diary of what the device is told to do; each run of the work takes the next of ``durations``."""

    def __init__(self, durations):
        self.diary, self.durations, self.now = [], iter(durations), 0.0

    def work(self):
        self.diary.append("work")
        self.now += next(self.durations)

    def event(self, enable_timing):
        assert enable_timing
        return StubEvent(self)


class StubEvent:
    def __init__(self, device):
        self.device, self.at = device, None

    def record(self):
        self.at = self.device.now
        self.device.diary.append("event")

    def elapsed_time(self, other):
        return other.at - self.at


class StubBuffer:
    def __init__(self, device):
        self.device = device

    def zero_(self):
        self.device.diary.append("flush")
        self.device.now += 100.0


def _stub(monkeypatch, durations):
    device = StubDevice(durations)
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda clocks: device.diary.append("sleep"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: device.diary.append("synchronise"))
    monkeypatch.setattr(timing.torch, "empty", lambda *_, **__: StubBuffer(device))
    return device


def test_the_median_of_flushed_runs(monkeypatch):
    device = _stub(monkeypatch, [900.0, 30.0, 1.0, 2.0, 500.0, 3.0, 4.0, 5.0, 6.0])
    assert Clock(smoke=False).milliseconds(device.work) == 4.0
    run = ["flush", "sleep", "event", "work", "event"]
    assert device.diary == ["work", *run, "synchronise", *(run * timing.LEAST_RUNS), "synchronise"]


@pytest.mark.parametrize(("duration", "runs"), [(0.001, timing.MOST_RUNS), (12.0, 10), (1000.0, timing.LEAST_RUNS)])
def test_short_work_is_run_more_often(monkeypatch, duration, runs):
    device = _stub(monkeypatch, [duration] * 99)
    assert Clock(smoke=False).milliseconds(device.work) == pytest.approx(duration)
    assert device.diary.count("work") == 2 + runs


def test_without_a_device_the_work_runs_and_has_no_time():
    ran = []
    assert Clock(smoke=True).milliseconds(lambda: ran.append(1)) is None
    assert peak_extra_mib(lambda: ran.append(2), smoke=True) is None
    assert ran == [1]
