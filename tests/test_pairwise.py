"""The plan meets every pair, in few cases, always the same."""

from itertools import combinations, product

import pytest
from pairwise import pairwise

SETTINGS = [
    {"a": [1, 2], "b": "xyz"},
    {"a": [1], "b": "x"},
    {"one": range(10), "two": range(8), "three": range(6), "four": range(4), "five": range(2)},
    {"lists": [[], [1]], "dicts": [{}, {"k": 1}, {"k": 2}], "flag": [False, True]},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda x: "-".join(x))
def test_any_two_values_meet(settings):
    cases = pairwise(**settings)
    for a, b in combinations(settings, 2):
        met = [(case[a], case[b]) for case in cases]
        assert all(pair in met for pair in product(settings[a], settings[b]))


def test_cases_are_few():
    assert len(pairwise(**SETTINGS[2])) < 1.2 * 10 * 8
    assert len(pairwise(a="xyz", b="xyz", c="xyz")) <= 11


def test_a_plan_is_always_the_same():
    assert pairwise(**SETTINGS[2]) == pairwise(**SETTINGS[2])


def test_cheap_values_come_more_often():
    cases = pairwise(size=[1, 2, 3], way=["cheap", "dear"], many=range(9))
    assert sum(case["way"] == "cheap" for case in cases) >= sum(case["way"] == "dear" for case in cases)
