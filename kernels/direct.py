"""An operator's own functions without the operator, for calls that no compiler looks at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.autograd import Function
from torch.autograd.function import once_differentiable


def direct(
    forward: Callable[..., Any], setup_context: Callable[..., None], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """What `torch.library` would make of the three, as a plain function of autograd: it has the same signature, results
    and gradients. Gradients of gradients are refused.

    A registered operator costs more a call: on 2 Zen 5 cores, forward and backward through RMSNorm or SwiGLU took 0.08
    to 0.1 ms less so.
    """
    parts = {"forward": forward, "setup_context": setup_context, "backward": once_differentiable(backward)}
    return type(forward.__name__, (Function,), {name: staticmethod(part) for name, part in parts.items()}).apply
