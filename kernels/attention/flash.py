"""flash-attn, where it is installed, as one more implementation of attention: the same results by its own kernels.

Two packages offer `flash_attn_varlen_func`: flash_attn (FlashAttention-2, NVIDIA GPUs from sm_80 on) and
flash_attn_interface (FlashAttention-3, sm_90). What their arguments mean, as their sources say, and ours beside it:

- `window_size=(left, right)` counts keys to each side, the last one included, −1 for no limit: our window W is (W, W),
  and (W, 0) if causal. (transformers passes W − 1, because its windows count the token itself.)
- The causal triangle ends at the last query and the last key; with as many queries as keys that is ours.
- Logits are softcap · tanh(scale · q·kᵀ / softcap), 0 for no cap; query head h reads key head h // (Hq // Hkv): ours.
- The backward pass gives the same bits each time only with `deterministic=True`, which we always pass.
- Dropout takes its mask from PyTorch's CUDA generator and follows no seed of ours; FlashAttention-3 has none.
- Sequences follow each other without gaps. A padded batch is gathered first and scattered afterwards, which is a copy.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..dispatch import Choice
from ..layout import SequenceLayout

FLASH_3, FLASH_2 = "flash_attn_interface", "flash_attn"
PACKAGES = (FLASH_3, FLASH_2)
NAMES = {FLASH_3: "FlashAttention-3", FLASH_2: "FlashAttention-2"}
MAX_HEAD_DIM = 256
MAX_DETERMINISTIC_HEAD_DIM_3 = 192  # its backward pass at 256 has no deterministic variant
MAX_SEQUENCES_2 = 65535  # it launches one grid row a sequence
_PASSED = (
    *("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "softmax_scale", "causal"),
    *("window_size", "softcap", "deterministic"),
)
_RETURN_LSE = "return_attn_probs"  # early releases of FlashAttention-3 have no such argument
_OPERATORS = {FLASH_3: "_flash_attn_forward", FLASH_2: "_flash_attn_varlen_forward"}


@dataclass(frozen=True)
class Call:
    """What of a call decides whether flash-attn can run it."""

    dtype: torch.dtype
    head_dim: int
    sequences: int
    packed: bool
    softcap: bool
    dropout: bool
    seeded: bool
    lse: bool
    gradient: bool


@dataclass(frozen=True)
class Offer:
    """The package that runs a call; None where none can.

    Attributes:
        package: one of `PACKAGES`, or None.
        machine_can: a package runs on this machine, though perhaps not this call.
        refused: {"flash": why no package can, in words}; empty where one can.
        preferred: what backend="auto" takes before our own kernels; None where it does not.
    """

    package: str | None
    machine_can: bool
    refused: dict[str, str]
    preferred: Choice | None = None


def offer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: SequenceLayout,
    *,
    softcap: float | None,
    dropout_p: float,
    seed: int | Tensor | None,
    return_lse: bool,
) -> Offer:
    """The package that runs this call of attention: FlashAttention-3 where it can, else FlashAttention-2."""
    call = Call(
        dtype=q.dtype,
        head_dim=q.shape[2],
        sequences=len(layout),
        packed=layout.padded_shape is None,
        softcap=softcap is not None,
        dropout=dropout_p > 0,
        seeded=seed is not None,
        lse=return_lse,
        gradient=torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad),
    )
    problems = {package: machine_problem(package, q.device) for package in PACKAGES}
    here = [package for package in PACKAGES if problems[package] is None]
    for package in here:
        problems[package] = _call_problem(package, q.device, call)
        if problems[package] is None:
            return Offer(package, True, {}, _preference(package, q.device, call))
    reasons = dict.fromkeys(str(problems[package]) for package in here or PACKAGES)
    return Offer(None, bool(here), {"flash": "; ".join(reasons)})


def attention_flash(
    package: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: SequenceLayout,
    *,
    causal: bool,
    window: int | None,
    softcap: float | None,
    scale: float,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """q (T, Hq, D), k and v (T, Hkv, D) → output (T, Hq, D), and log-sum-exp (T, Hq) float32 if asked for.

    Rows in no sequence hold 0 and −inf. Differentiable through flash-attn's own operators; ``package`` is one that
    `offer` named for this call.
    """
    if layout.max_length == 0:  # flash-attn refuses a batch without a sequence or a token
        out = torch.zeros_like(q) + (q[:0].sum() + k[:0].sum() + v[:0].sum())
        return out, q.new_full(q.shape[:2], float("-inf"), dtype=torch.float32) if return_lse else None
    rows = None if layout.padded_shape is None else layout.rows
    if rows is not None:
        q, k, v = (x.index_select(0, rows) for x in (q, k, v))
    # Told that no sequence has two tokens, flash-attn 2 swaps heads and queries, which goes wrong where some have none.
    longest = max(layout.max_length, 2)
    cu_seqlens = _cu_seqlens(layout)
    arguments: dict[str, Any] = {
        "q": q, "k": k, "v": v, "cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens,
        "max_seqlen_q": longest, "max_seqlen_k": longest, "softmax_scale": scale, "causal": causal,
        "window_size": (-1, -1) if window is None else (window, 0 if causal else window), "softcap": softcap or 0.0,
        "deterministic": True,
    }  # fmt: skip
    if dropout_p:
        arguments["dropout_p"] = dropout_p
    if return_lse:
        arguments[_RETURN_LSE] = True
    result = _function(package)(**arguments)
    out, lse = (result[0], result[1].detach().T) if return_lse else (result, None)
    return (out, lse) if rows is None else _scattered(out, lse, rows, layout.total)


def _cu_seqlens(layout: SequenceLayout) -> Tensor:
    """The layout's, which it computes once; torch.compile cannot trace how, but merges equal computations itself."""
    if torch.compiler.is_compiling():
        return torch.nn.functional.pad(layout.lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return layout.cu_seqlens


def _scattered(out: Tensor, lse: Tensor | None, rows: Tensor, total: int) -> tuple[Tensor, Tensor | None]:
    spread = out.new_zeros((total, *out.shape[1:])).index_copy(0, rows, out)
    if lse is None:
        return spread, None
    return spread, lse.new_full((total, lse.shape[1]), float("-inf")).index_copy(0, rows, lse)


# torch.compile can trace neither imports nor questions to a GPU, and need not: the answers stay the same.
@torch.compiler.assume_constant_result
def machine_problem(package: str, device: torch.device) -> str | None:
    """Why ``package`` cannot run on ``device`` at all, in words; None where it can."""
    capability = _capability(device)
    if capability is None:
        return f"flash-attn runs on NVIDIA GPUs, not on {'ROCm' if device.type == 'cuda' else device.type} tensors"
    chip = f"sm_{capability[0]}{capability[1]}"
    if package == FLASH_3 and capability != (9, 0):
        return f"FlashAttention-3 needs sm_90 and this GPU is {chip}"
    if capability < (8, 0):
        return f"FlashAttention-2 needs sm_80 or newer and this GPU is {chip}"
    return _package_problem(package)


def _capability(device: torch.device) -> tuple[int, int] | None:
    """(major, minor) of an NVIDIA GPU; None for any other device."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability(device)


@cache
def _package_problem(package: str) -> str | None:
    """Why it cannot be used, whatever the GPU: it is not there, broken (built for another PyTorch, often), or old."""
    try:
        function = import_module(package).flash_attn_varlen_func
    except ModuleNotFoundError as error:
        found = error.name != package
        return f"{package} cannot be imported ({error})" if found else f"{package} is not installed"
    except (ImportError, OSError, AttributeError) as error:
        return f"{package} cannot be imported ({error})"
    missing = [name for name in _PASSED if name not in inspect.signature(function).parameters]
    return f"{package} is too old: flash_attn_varlen_func takes no {', '.join(missing)}" if missing else None


def _call_problem(package: str, device: torch.device, call: Call) -> str | None:
    """Why a package that runs here cannot run this call, in words; None where it can."""
    name = NAMES[package]
    if call.dtype not in (torch.float16, torch.bfloat16):
        return f"flash-attn takes float16 and bfloat16, not {str(call.dtype).removeprefix('torch.')}"
    if call.head_dim > MAX_HEAD_DIM:
        return f"flash-attn takes a head_dim of {MAX_HEAD_DIM} at most, not {call.head_dim}"
    if not call.packed and torch.compiler.is_compiling():
        return "flash-attn takes packed batches only inside torch.compile, which cannot trace how others are gathered"
    if call.dropout and call.seeded:
        return "flash-attn draws its own dropout mask and follows no seed"
    if call.lse and not _returns_lse(package):
        return f"this release of {name} does not return the log-sum-exp"
    if package == FLASH_3:
        if call.dropout:
            return f"{name} has no dropout"
        if call.head_dim % 8:
            return f"{name} takes a head_dim that is a multiple of 8, not {call.head_dim}"
        if call.gradient and call.head_dim > MAX_DETERMINISTIC_HEAD_DIM_3:
            return f"the gradient of {name} is not deterministic at head_dim {call.head_dim}"
        return None
    if call.dropout and call.softcap:
        return f"{name} has no dropout together with softcap"
    if call.sequences > MAX_SEQUENCES_2:
        return f"{name} takes {MAX_SEQUENCES_2:,} sequences at most, not {call.sequences:,}"
    # Without a gradient too: another backend would run the pass for it, and drop other weights.
    if call.dropout and call.head_dim > 192 and not _has_large_shared_memory(device):
        return f"the gradient of {name} with dropout at head_dim {call.head_dim} needs sm_80 or sm_90"
    return None


def describe(device: torch.device) -> Choice:
    """For a person: the flash-attn that attention uses on a device ("none" if it cannot), and when or why not."""
    problems = {package: machine_problem(package, device) for package in PACKAGES}
    for package, problem in problems.items():
        if problem is None:
            if _at_home(package, device):
                return Choice(NAMES[package], "for packed float16 and bfloat16 batches without dropout")
            return Choice(NAMES[package], "only where asked for, by backend='flash'")
    return Choice("none", "; ".join(dict.fromkeys(map(str, problems.values()))))


@torch.compiler.assume_constant_result
def _at_home(package: str, device: torch.device) -> bool:
    """On the GPUs that its authors made it for."""
    capability = _capability(device)
    return package == FLASH_3 or (capability is not None and capability[0] == 8)


@torch.compiler.assume_constant_result
def _has_large_shared_memory(device: torch.device) -> bool:
    return _capability(device) in ((8, 0), (9, 0))


def _preference(package: str, device: torch.device, call: Call) -> Choice | None:
    """What "auto" takes before our own kernels: flash-attn where it is at home and nothing about the result changes.

    At home means FlashAttention-3 on sm_90 and FlashAttention-2 on sm_8x, where its authors' measurements are the best
    published. On newer chips FlashAttention-2 runs instructions of sm_80, which our kernels are compiled beyond. A
    padded batch would be copied, and a dropout mask would differ from the other backends': those stay with Triton, and
    so does what torch.compile traces where a release of flash-attn is no operator to it, which would break the graph.
    """
    if not _at_home(package, device) or not call.packed or call.dropout:
        return None
    if torch.compiler.is_compiling() and not _is_operator(package):
        return None
    return Choice("flash", f"{NAMES[package]} is installed and this GPU is what it was made for")


@torch.compiler.assume_constant_result
def _returns_lse(package: str) -> bool:
    return _RETURN_LSE in inspect.signature(_function(package)).parameters


@torch.compiler.assume_constant_result
def _is_operator(package: str) -> bool:
    """Whether its forward pass is registered with PyTorch as an operator."""
    module = inspect.getmodule(_function(package))
    return isinstance(getattr(module, _OPERATORS[package], None), torch.library.CustomOpDef)


def _function(package: str) -> Any:
    """Written as imports, which torch.compile follows."""
    if package == FLASH_3:
        from flash_attn_interface import flash_attn_varlen_func
    else:
        from flash_attn import flash_attn_varlen_func
    return flash_attn_varlen_func
