"""The gate names what is wrong with a kernel, and lets pass only what a named exception allows."""

from dataclasses import replace

import pytest

from benchmarks.codegen.compiling import Variant
from benchmarks.codegen.report import problems, table
from benchmarks.codegen.rows import Row
from benchmarks.codegen.variants import NOTHING, Allowance, allowance_for, families, family_module

GOOD = Row("kernel", "sm_90", 3.0, 168, 0, False, 65536, 4, 2, "wgmma", 2, {"all": 500, "asynchronous": 2}, 500.0)
VARIANT = Variant("kernel", None, {})
COPY = Row("copy", "sm_90", 1.0, 32, 0, False, 0, 4, 1, "", accesses=4, wide_accesses=3, wide_share=0.92)


def test_a_good_kernel_has_no_problems():
    assert problems(GOOD, VARIANT, NOTHING) == []
    assert problems(COPY, replace(VARIANT, products="none", wide=0.9), NOTHING) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shared_bytes": 240 * 1024}, "shared memory"),
        ({"compile_seconds": 21.0}, "21.0 s to compile"),
        ({"spilled_bytes": 8}, "spills 8 bytes"),
        ({"loop": {"local": 3, "asynchronous": 1}}, "3 spills in its inner loop"),
        ({"serialised": True}, "serialised"),
        ({"tensor_instruction": "mma.sync"}, "mma.sync, not wgmma"),
        ({"tensor_instruction": ""}, "no tensor instruction"),
        ({"loop": {"all": 500}}, "asynchronously"),
    ],
    ids=str,
)
def test_each_fault_is_named(change, words):
    (problem,) = problems(replace(GOOD, **change), VARIANT, NOTHING)
    assert words in problem


@pytest.mark.parametrize("found", [500.0, None])
def test_a_longer_loop_than_its_goal_is_named(found):
    row = replace(GOOD, instructions_per_mflop=found)
    (problem,) = problems(row, VARIANT, NOTHING, most_instructions=499)
    assert "499 are allowed" in problem
    assert problems(GOOD, VARIANT, NOTHING, most_instructions=500) == []


def test_narrow_accesses_of_an_element_wise_kernel_are_named():
    (problem,) = problems(COPY, replace(VARIANT, products="none", wide=0.95), NOTHING)
    assert "92%" in problem
    assert "3 of 4 (92% of bytes)" in table([COPY])


def test_an_allowance_lets_pass_as_much_as_it_says_and_no_more():
    allowed = Allowance("the accumulators fill the registers", spilled_bytes=8, loop_spills=2)
    assert problems(replace(GOOD, spilled_bytes=8, loop={"local": 2, "asynchronous": 1}), VARIANT, allowed) == []
    assert len(problems(replace(GOOD, spilled_bytes=12), VARIANT, allowed)) == 1


def test_an_allowance_for_a_release_holds_only_there(monkeypatch):
    old, other = Allowance("the old compiler's registers", 24), Allowance("the new compiler's", 8)
    known = {("kernel", "sm_90", "3.6"): old, ("kernel", "sm_90"): other, ("copy", "sm_90", "3.6"): old}
    monkeypatch.setattr(family_module("rotary"), "ALLOWANCES", known)
    assert allowance_for("rotary", "kernel", "sm_90", "3.6.0") is old
    assert allowance_for("rotary", "kernel", "sm_90", "3.9.0") is other
    assert allowance_for("rotary", "copy", "sm_90", "3.9.0") is NOTHING
    assert allowance_for("rotary", "copy", "sm_80", "3.6.0") is NOTHING


@pytest.mark.parametrize("family", families())
def test_every_allowance_and_goal_is_of_a_kernel_that_exists(family):
    module = family_module(family)
    for (name, architecture, *_release), allowed in getattr(module, "ALLOWANCES", {}).items():
        assert name in {variant.name for variant in module.all_variants(architecture)}
        assert allowed.reason
    for name, architecture in getattr(module, "MOST_INSTRUCTIONS", {}):
        assert name in {variant.name for variant in module.main_variants(architecture)}


@pytest.mark.parametrize("family", families())
def test_every_main_kernel_is_among_all(family):
    names = [variant.name for variant in family_module(family).all_variants("sm_90")]
    assert len(set(names)) == len(names)
    assert {variant.name for variant in family_module(family).main_variants("sm_90")} <= set(names)
