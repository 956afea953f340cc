"""What the tests of element-wise operations share: outputs and gradients, three ways, by the one tolerance rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from attention_cases import uninitialised_memory_is_nan
from numerics import GRADIENT_FACTOR, assert_error_within
from torch import Tensor

TRITON_DTYPES = (torch.float32, torch.float16)
BLOCKED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = [("blocked", dtype) for dtype in BLOCKED_DTYPES] + [("triton", dtype) for dtype in TRITON_DTYPES]
BACKEND_IDS = [f"{backend}-{str(dtype).removeprefix('torch.')}" for backend, dtype in BACKENDS]


def assert_as_exact(call: Callable[..., Any], tensors: Sequence[Tensor], backend: str, fixed: int = 0) -> None:
    """Outputs of ``call(*tensors, backend=…)`` and gradients of all but the last ``fixed`` tensors keep the rule."""
    with uninitialised_memory_is_nan():
        ours = _run(call, tensors, backend, fixed)
    plain = _run(call, tensors, "reference", fixed)
    exact = _run(call, [x.double() for x in tensors], "reference", fixed)
    for i, results in enumerate(zip(ours[0], plain[0], exact[0], strict=True)):
        assert_error_within(*results, name=f"output {i}")
    for i, results in enumerate(zip(ours[1], plain[1], exact[1], strict=True)):
        assert_error_within(*results, factor=GRADIENT_FACTOR, name=f"gradient {i}")


def without_gradients(call: Callable[..., Any], tensors: Sequence[Tensor], backend: str) -> None:
    """The same under no_grad, where operations take a shorter way."""
    with torch.no_grad():
        with uninitialised_memory_is_nan():
            ours = _tuple(call(*tensors, backend=backend))
        plain = _tuple(call(*tensors, backend="reference"))
        exact = _tuple(call(*(x.double() for x in tensors), backend="reference"))
    for results in zip(ours, plain, exact, strict=True):
        assert_error_within(*results)


def _run(call: Callable[..., Any], tensors: Sequence[Tensor], backend: str, fixed: int) -> tuple[Any, Any]:
    free = len(tensors) - fixed
    given = [x.detach().requires_grad_(i < free) for i, x in enumerate(tensors)]
    outputs = _tuple(call(*given, backend=backend))
    generator = torch.Generator().manual_seed(7)
    seeds = [torch.randn(x.shape, generator=generator).to(tensors[0].dtype).to(x.dtype) for x in outputs]
    return outputs, torch.autograd.grad(outputs, given[:free], seeds)


def _tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)
