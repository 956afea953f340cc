"""Which implementation of an operation runs, and why. The only place that decides."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

from torch import Tensor

ENVIRONMENT_VARIABLE = "LLM2VEC_FAST_BACKEND"
BACKENDS = ("auto", "reference", "blocked", "triton", "flash")
TRITON_DEVICES = ("cuda", "xpu")  # ROCm devices call themselves cuda


class BackendUnavailableError(RuntimeError):
    """The backend asked for cannot run this operation here."""


@dataclass(frozen=True)
class Choice:
    """The backend that runs, and the reason in words."""

    backend: str
    reason: str


def choose(
    operation: str,
    requested: str,
    device: str,
    implemented: Collection[str],
    *,
    refused: Mapping[str, str] | None = None,
    preferred: Choice | None = None,
) -> Choice:
    """Pick the implementation of ``operation`` for tensors on ``device`` (a device type: "cpu", "cuda", …).

    ``requested`` is the caller's ``backend=``; "auto" defers to the environment variable LLM2VEC_FAST_BACKEND, then to
    ``preferred``, then to the device. ``implemented`` names the rooms that exist for the operation as called (without
    "triton", say, where the kernel has no gradient yet): the environment variable is passed over for the others.
    ``refused`` says of a backend why it cannot run, where the device alone does not tell.

    Raises:
        ValueError: the backend's name is unknown.
        BackendUnavailableError: an explicit backend cannot run here; the message says why.
    """
    if requested not in BACKENDS:
        raise ValueError(f"backend={requested!r} is unknown: choose one of {', '.join(BACKENDS)}")
    refused = refused or {}
    if requested != "auto":
        _require(operation, requested, device, implemented, refused)
        return Choice(requested, "asked for by backend=")
    override = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
    if override not in BACKENDS:
        raise ValueError(f"{ENVIRONMENT_VARIABLE}={override!r} is unknown: choose one of {', '.join(BACKENDS)}")
    if override != "auto" and override in implemented:
        _require(operation, override, device, implemented, refused)
        return Choice(override, f"asked for by {ENVIRONMENT_VARIABLE}")
    if preferred is not None:
        return preferred
    problem = triton_problem(device) if "triton" in implemented else f"{operation} has no Triton kernel for this call"
    if problem is None and not interpreting():
        return Choice("triton", f"{device} tensors with Triton")
    return Choice("blocked", problem or "Triton's interpreter is for tests: ask for it with backend='triton'")


def backend_for(
    operation: str,
    requested: str,
    tensor: Tensor,
    implemented: Collection[str],
    *,
    refused: Mapping[str, str] | None = None,
    preferred: Choice | None = None,
) -> str:
    """The backend that `choose` picks for the device that ``tensor`` lives on."""
    if requested == "auto" and tensor.is_cpu and preferred is None and ENVIRONMENT_VARIABLE not in os.environ:
        return "blocked"  # as below, in a third of the time, which one text's norms and gates would notice
    return choose(operation, requested, tensor.device.type, implemented, refused=refused, preferred=preferred).backend


def triton_problem(device: str) -> str | None:
    """Why Triton kernels cannot run on this device type, in words; None where they can."""
    if not _triton_installed():
        return "Triton is not installed"
    if device in TRITON_DEVICES or interpreting():
        return None
    return f"Triton does not run on {device} tensors"


def interpreting() -> bool:
    """True where TRITON_INTERPRET=1 makes Triton run kernels on the CPU, slowly: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _require(
    operation: str, backend: str, device: str, implemented: Collection[str], refused: Mapping[str, str]
) -> None:
    if backend not in implemented and backend not in refused:
        others = ", ".join(name for name in implemented if name not in refused)
        raise BackendUnavailableError(
            f"{operation} has no {backend!r} implementation for this call: choose one of {others}"
        )
    problem = refused.get(backend) or (triton_problem(device) if backend == "triton" else None)
    if problem is not None:
        raise BackendUnavailableError(
            f"{operation} cannot run on backend {backend!r}: {problem}; "
            "use backend='blocked', or 'auto' to let it choose"
        )


@cache
def _triton_installed() -> bool:
    return find_spec("triton") is not None
