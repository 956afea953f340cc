"""The one tolerance rule of every kernel test: as exact as plain PyTorch in the same dtype.

Three computations of the same thing are compared: ours, plain PyTorch in the same dtype, and the definition in float64.

    error(ours) ≤ factor × error(plain) + one rounding band of the dtype

The error is taken twice, as the largest absolute difference and as the root mean square, so that neither one bad
element nor many slightly bad ones hide. The rounding band is the dtype's spacing at the scale of the exact result.
"""

from __future__ import annotations

import torch
from torch import Tensor

OUTPUT_FACTOR = 2.0
GRADIENT_FACTOR = 3.0


def assert_error_within(
    ours: Tensor, plain: Tensor, exact: Tensor, factor: float = OUTPUT_FACTOR, name: str = "result"
) -> None:
    """Assert that ``ours`` is as close to ``exact`` (float64) as ``plain`` is, by the rule above.

    ``ours`` and ``plain`` have the same shape and dtype; pass ``factor=GRADIENT_FACTOR`` for gradients. Infinities and
    NaNs of ``exact`` must be met exactly; anywhere else ``ours`` must be finite.
    """
    assert exact.dtype == torch.float64, f"exact must be computed in float64, it is {exact.dtype}"
    assert ours.shape == exact.shape, f"{name} has shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    assert plain.shape == exact.shape, f"plain {name} has shape {tuple(plain.shape)}, expected {tuple(exact.shape)}"
    assert ours.dtype == plain.dtype, f"{name} is {ours.dtype}, plain PyTorch gives {plain.dtype}"
    precision = torch.finfo(ours.dtype)
    ours, plain, exact = (x.detach().double().cpu() for x in (ours, plain, exact))
    finite = exact.isfinite()
    assert torch.equal(ours.isnan(), exact.isnan()), f"{name}: {_count(ours.isnan() & ~exact.isnan())} are NaN"
    special = ~finite & ~exact.isnan()
    assert torch.equal(ours[special], exact[special]), f"{name}: an infinity is missing"
    ours, plain, exact = ours[finite], plain[finite], exact[finite]
    assert bool(ours.isfinite().all()), f"{name}: {_count(ours.isinf())} are infinite"
    for kind, size in (("largest", _largest), ("root mean square", _root_mean_square)):
        band = precision.eps * size(exact) + precision.tiny * precision.eps
        allowed = factor * size(plain - exact) + band
        error = size(ours - exact)
        assert error <= allowed, (
            f"{name}: {kind} error {error:.3e} exceeds {allowed:.3e} = "
            f"{factor:g} × plain's {size(plain - exact):.3e} + rounding {band:.3e}"
        )


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def _root_mean_square(x: Tensor) -> float:
    return float(x.square().mean().sqrt()) if x.numel() else 0.0


def _count(mask: Tensor) -> str:
    return f"{int(mask.sum())} of {mask.numel()} elements"
