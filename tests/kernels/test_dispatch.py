"""One rule decides which implementation runs, and says why."""

import pytest

from llm2vec_fast.kernels import dispatch
from llm2vec_fast.kernels.dispatch import BackendUnavailableError, Choice, choose

ALL = ("reference", "blocked", "triton")
FLASH = Choice("flash", "made for this GPU")


@pytest.fixture(autouse=True)
def _plain_process(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(dispatch, "_triton_installed", lambda: True)


@pytest.mark.parametrize(
    ("device", "implemented", "backend", "reason"),
    [
        ("cuda", ALL, "triton", "cuda tensors with Triton"),
        ("xpu", ALL, "triton", "xpu tensors with Triton"),
        ("cpu", ALL, "blocked", "does not run on cpu"),
        ("cuda", ("reference", "blocked"), "blocked", "no Triton kernel for this call"),
    ],
)
def test_auto_follows_the_device(device, implemented, backend, reason):
    choice = choose("attention", "auto", device, implemented)
    assert choice.backend == backend
    assert reason in choice.reason


def test_auto_without_triton_is_blocked(monkeypatch):
    monkeypatch.setattr(dispatch, "_triton_installed", lambda: False)
    choice = choose("attention", "auto", "cuda", ALL)
    assert (choice.backend, choice.reason) == ("blocked", "Triton is not installed")


def test_the_interpreter_runs_only_when_asked_for(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose("attention", "auto", "cpu", ALL).backend == "blocked"
    assert choose("attention", "triton", "cpu", ALL).backend == "triton"


def test_the_environment_overrides_auto_but_not_an_explicit_backend(monkeypatch):
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "reference")
    assert choose("attention", "auto", "cuda", ALL).backend == "reference"
    assert choose("attention", "blocked", "cuda", ALL).backend == "blocked"


@pytest.mark.parametrize(("requested", "implemented"), [("triton", ALL), ("triton", ("blocked",))])
def test_an_explicit_backend_that_cannot_run_says_why(requested, implemented):
    with pytest.raises(BackendUnavailableError, match="attention"):
        choose("attention", requested, "cpu", implemented)


def test_unknown_names_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="'cuda' is unknown"):
        choose("attention", "cuda", "cpu", ALL)
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "fast")
    with pytest.raises(ValueError, match="LLM2VEC_FAST_BACKEND='fast' is unknown"):
        choose("attention", "auto", "cpu", ALL)


def test_what_is_preferred_comes_before_the_device_and_after_what_was_asked_for(monkeypatch):
    everything = (*ALL, "flash")
    assert choose("attention", "auto", "cuda", everything, preferred=FLASH) == FLASH
    assert choose("attention", "triton", "cuda", everything, preferred=FLASH).backend == "triton"
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "triton")
    assert choose("attention", "auto", "cuda", everything, preferred=FLASH).backend == "triton"


def test_a_refused_backend_says_why_only_when_asked_for(monkeypatch):
    refused = {"flash": "it is not installed"}
    assert choose("attention", "auto", "cuda", (*ALL, "flash"), refused=refused).backend == "triton"
    with pytest.raises(BackendUnavailableError, match="'flash': it is not installed"):
        choose("attention", "flash", "cuda", (*ALL, "flash"), refused=refused)
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "flash")
    with pytest.raises(BackendUnavailableError, match="'flash': it is not installed"):
        choose("attention", "auto", "cuda", (*ALL, "flash"), refused=refused)


def test_the_environment_is_passed_over_for_calls_it_cannot_have(monkeypatch):
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "flash")
    assert choose("pool", "auto", "cuda", ALL).backend == "triton"
    assert choose("attention", "auto", "cuda", ALL, refused={"flash": "q is float32"}).backend == "triton"
