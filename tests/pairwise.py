"""Few cases that meet every pair of values: a plan for tests of several settings at once.

A fault seldom needs more than two settings to meet. A full product of five settings of six values has 7,776 cases;
some forty hold every pair.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import combinations
from typing import Any


def pairwise(**settings: Collection[Any]) -> list[dict[str, Any]]:
    """Cases, as one value of each setting by name, among which any two values of different settings meet.

    The same settings give the same cases in the same order. The earlier of a setting's values are taken where any will
    do: put the cheap ones first.
    """
    choices = [list(range(len(values))) for values in settings.values()]
    missing = {(a, i, b, j) for a, b in combinations(range(len(choices)), 2) for i in choices[a] for j in choices[b]}
    cases = []
    while missing:
        first = min(missing)
        case = {first[0]: first[1], first[2]: first[3]}
        for setting in sorted(range(len(choices)), key=lambda x: -len(choices[x])):
            if setting not in case:
                gains = [_met(missing, case, setting, value) for value in choices[setting]]
                case[setting] = gains.index(max(gains))
        missing -= {(a, case[a], b, case[b]) for a, b in combinations(range(len(choices)), 2)}
        cases.append(case)
    return [_named(settings, case) for case in cases]


def _met(missing: set[tuple[int, int, int, int]], case: Mapping[int, int], setting: int, value: int) -> int:
    """How many of the missing pairs a value would add to a case."""
    return sum(
        ((setting, value, other, chosen) if setting < other else (other, chosen, setting, value)) in missing
        for other, chosen in case.items()
    )


def _named(settings: Mapping[str, Collection[Any]], case: Mapping[int, int]) -> dict[str, Any]:
    return {name: list(values)[case[i]] for i, (name, values) in enumerate(settings.items())}
