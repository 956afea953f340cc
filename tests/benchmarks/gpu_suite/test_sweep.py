"""The sweep tries what lies around a chosen configuration, survives what does not compile, and names the best."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

import dataclasses

from benchmarks.gpu.section import Context
from benchmarks.gpu.sections import sweep
from benchmarks.gpu.sections.sweep import neighbours, using
from llm2vec_fast.kernels.attention import configurations
from llm2vec_fast.kernels.attention.configurations import Configuration

CHOSEN = Configuration(128, 64, 8, 2)


def test_neighbours_differ_in_one_choice_and_begin_with_the_chosen_one():
    around = neighbours(CHOSEN)
    assert around[0] == CHOSEN
    assert len(set(around)) == len(around)
    assert {(x.block_q, x.block_k) for x in around} == {
        (128, 64),
        (64, 64),
        (128, 32),
        (128, 128),
        (64, 128),
    }
    assert {(x.warps, x.stages) for x in around} == {(8, 2), (4, 2), (8, 1), (8, 3)}
    assert all(x.block_q >= 16 and x.stages >= 1 for x in neighbours(Configuration(16, 16, 4, 1)))


def test_a_configuration_is_used_and_put_back():
    before = configurations.forward
    with using("forward", CHOSEN):
        assert configurations.forward("whatever", "it is", "asked") is CHOSEN
    assert configurations.forward is before


def test_what_does_not_compile_is_named_and_the_rest_measured():
    broken = dataclasses.replace(CHOSEN, block_k=24)  # no power of two
    small = Configuration(16, 16, 4, 1)
    problems = sweep._compile_beforehand({("forward", 16): [broken, small]}, Context(True, 60.0))
    assert list(problems) == [("forward", 16, broken)]
    rows = list(sweep._measure("forward", 16, [broken, small], problems, Context(True, 60.0), _StubClock()))
    assert [(row["contender"], row["verdict"]) for row in rows] == [
        ("128×24, 8 warps, 2 stages", "not run"),
        ("16×16, 4 warps, 1 stages", "right"),
    ]


def test_the_best_is_named_beside_the_chosen_one():
    chosen = sweep.describe(CHOSEN)
    found = [{"contender": chosen, "ms": 3.0}, {"contender": "other", "ms": 2.0}, {"contender": "broken"}]
    (row,) = sweep._best("forward", 64, CHOSEN, found)
    assert (row["contender"], row["ms"]) == ("other", 2.0)
    assert row["note"] == f"chosen is {chosen}, 1.50 × the best's time"
    assert list(sweep._best("forward", 64, CHOSEN, [{"contender": "broken"}])) == []


class _StubClock:
    def milliseconds(self, work):
        work()
        return 1.0
