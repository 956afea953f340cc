"""`doctor` says what flash-attn would do here, and shows a backend that the environment asks for in vain."""

import json
import sys

import flash_packages
import pytest

from llm2vec_fast.kernels.attention import flash
from llm2vec_fast.kernels.dispatch import ENVIRONMENT_VARIABLE


@pytest.fixture
def backends(invoke, monkeypatch):
    """What doctor says of backends, as if flash-attn were not installed unless a test does so."""
    for package in flash.PACKAGES:
        monkeypatch.setitem(sys.modules, package, None)
    flash._package_problem.cache_clear()
    yield lambda: json.loads(invoke("doctor", "--json").stdout)["backends"]
    flash._package_problem.cache_clear()


def test_without_flash_attn_it_says_why(backends, monkeypatch):
    assert backends()["flash-attn on cpu"]["why"] == "flash-attn runs on NVIDIA GPUs, not on cpu tensors"
    monkeypatch.setattr(flash, "_capability", lambda _: (8, 0))
    line = backends()["flash-attn on cpu"]
    assert line["chosen"] == "none"
    assert "flash_attn is not installed" in line["why"]


@pytest.mark.parametrize(
    ("package", "function", "capability", "name", "when"),
    [
        (flash.FLASH_3, flash_packages.flash_attn_3, (9, 0), "FlashAttention-3", "for packed float16"),
        (flash.FLASH_2, flash_packages.flash_attn_2, (8, 6), "FlashAttention-2", "for packed float16"),
        (flash.FLASH_2, flash_packages.flash_attn_2, (9, 0), "FlashAttention-2", "only where asked for"),
    ],
)
def test_with_flash_attn_it_says_when(backends, monkeypatch, package, function, capability, name, when):
    flash_packages.install(monkeypatch, package, function)
    monkeypatch.setattr(flash, "_capability", lambda _: capability)
    line = backends()["flash-attn on cpu"]
    assert line["chosen"] == name
    assert when in line["why"]


@pytest.mark.parametrize(
    ("asked", "why"), [("flash", "NVIDIA GPUs"), ("triton", "does not run on cpu"), ("gpu", "unknown")]
)
def test_a_backend_that_cannot_run_is_a_line_and_no_crash(backends, monkeypatch, asked, why):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, asked)
    line = backends()["attention on cpu"]
    assert line["chosen"] == "none"
    assert why in line["why"]
