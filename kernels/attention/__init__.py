"""Scaled dot-product attention within each sequence of a packed or padded batch: both ways, causal, or windowed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..dispatch import backend_for
from ..layout import SequenceLayout
from . import flash
from .blocked_operator import attention_blocked
from .dropout import Dropout, threshold_of
from .operator import attention_operator
from .reference import attention_reference

__all__ = ["attention"]

_ALL = ("reference", "blocked", "triton")
_FLOAT64 = ("reference", "blocked")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: SequenceLayout,
    *,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale · q·kᵀ) · v within each sequence of ``layout``; no token ever sees another sequence.

    Args:
        q: (T, Hq, D) queries, T the rows of the layout; float16, bfloat16 or float32 (float64 but on Triton). Strided
            views, such as slices of a fused projection, are read in place.
        k, v: (T, Hkv, D) keys and values; Hq is a multiple of Hkv (grouped-query attention: query head h reads key
            head h // (Hq // Hkv)).
        layout: which rows form a sequence, packed or padded; on the tensors' device.
        causal: a token attends to itself and earlier tokens only.
        window: a token attends to those at most ``window`` positions away, on both sides (the earlier side if causal):
            |i − j| ≤ window, as flash-attn's ``window_size=(window, window)`` says. transformers' ``sliding_window`` n
            is n − 1 here in a causal model, whose window counts the token itself, and n in one that attends both ways.
        softcap: logits become softcap · tanh(logits / softcap), as in Gemma 2.
        scale: factor on q·kᵀ; 1/√D if None.
        dropout_p: each attention weight is dropped with this probability (kept to 1/65536), the rest scaled up. What is
            dropped depends only on the seed, the sequence's number, head, query and key: it is the same on every
            backend but "flash", and for packed and padded batches.
        seed: int, or a tensor of one integer, that decides what is dropped; drawn from PyTorch's generator if None.
        return_lse: also return the logarithm of each row's softmax denominator; no gradient flows through it.
        backend: "auto", "reference", "blocked", "triton" or "flash" (flash-attn, where it is installed). "auto" takes
            flash-attn for packed float16 and bfloat16 batches without dropout, FlashAttention-3 on sm_90 and
            FlashAttention-2 on sm_8x: there its published speed is the best known, its results are ours within
            rounding, and its gradients deterministic. All else on a GPU runs on Triton: padded batches, which
            flash-attn has to copy, and dropout, whose mask flash-attn draws from PyTorch's generator; asked for by
            "flash" with FlashAttention-2, that mask is not the other backends', and a ``seed`` is refused.

    Returns:
        (T, Hq, D) in q's dtype, zeros on rows in no sequence; with ``return_lse`` also (T, Hq) float32 (float64 for
        float64), −inf on rows in no sequence. Under autocast, q, k and v are cast first.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or a setting is out of range.
        BackendUnavailableError: an explicit backend cannot run this call.

    What an encoder of whole texts has no use for is left out: key-value caches and queries that are not as many as the
    keys, ALiBi and other biases or masks on the logits, attention sinks, and whatever only helps to decode.

    Source: FlashAttention-2 (Dao, 2023, arXiv:2307.08691); softmax and sums in float32.
    """
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    _check_tensors(q, k, v, layout)
    _check_settings(window, softcap, scale, dropout_p)
    if isinstance(seed, Tensor) and (seed.numel() != 1 or seed.is_floating_point()):
        raise ValueError(f"seed has shape {tuple(seed.shape)} and dtype {seed.dtype}: pass one integer")
    scale = 1.0 / math.sqrt(q.shape[2]) if scale is None else scale
    offer = flash.offer(q, k, v, layout, softcap=softcap, dropout_p=dropout_p, seed=seed, return_lse=return_lse)
    choice = backend_for(
        "attention", backend, q, _implemented(q.dtype, offer), refused=offer.refused, preferred=offer.preferred
    )
    settings = {"causal": causal, "window": window, "softcap": softcap, "scale": scale}
    if choice == "flash":
        out, lse = flash.attention_flash(
            offer.package, q, k, v, layout, dropout_p=dropout_p, return_lse=return_lse, **settings
        )
        return (out, lse) if return_lse else out
    seed = _seed_tensor(seed, q.device) if dropout_p else None
    if choice == "triton":
        out, sums = attention_operator(
            q, k, v, layout.starts, layout.lengths, seed, causal, -1 if window is None else window, softcap or 0.0,
            scale, threshold_of(dropout_p),
        )  # fmt: skip
        return (out, sums[0].detach().T * math.log(2)) if return_lse else out
    if choice == "blocked":
        threshold = threshold_of(dropout_p)
        out, lse = attention_blocked(q, k, v, layout, threshold=threshold, seed=seed, return_lse=return_lse, **settings)
        return (out, lse.detach()) if return_lse else out
    dropout = Dropout(threshold_of(dropout_p), int(seed)) if dropout_p else None
    out, lse = attention_reference(q, k, v, layout, dropout=dropout, **settings)
    return (out, lse.detach()) if return_lse else out


def _implemented(dtype: torch.dtype, offer: flash.Offer) -> tuple[str, ...]:
    ours = _FLOAT64 if dtype == torch.float64 else _ALL
    return ours if offer.machine_can and offer.package is None else (*ours, "flash")


def _seed_tensor(seed: int | Tensor | None, device: torch.device | str) -> Tensor:
    """One int64 on ``device``; a tensor rather than an int, so that torch.compile need not know its value."""
    if seed is None:
        return torch.randint(2**62, (1,), device=device)
    return seed.to(device, torch.int64).view(1) if isinstance(seed, Tensor) else torch.tensor([seed], device=device)


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout) -> None:
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape or q.shape[2] != k.shape[2]:
        raise ValueError(
            f"q, k, v have shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}: "
            "pass q as (rows, heads, head_dim) and k and v as (rows, kv_heads, head_dim)"
        )
    if q.shape[0] != layout.total or k.shape[0] != layout.total:
        raise ValueError(
            f"q has {q.shape[0]} rows, k and v have {k.shape[0]}, the layout has {layout.total}: they must be equal"
        )
    if not (q.shape[1] and k.shape[1] and q.shape[2]):
        raise ValueError(f"q and k have shapes {tuple(q.shape)} and {tuple(k.shape)}: no head, or a head of no columns")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"q has {q.shape[1]} heads and k has {k.shape[1]}: the first must be a multiple of the second")
    if q.dtype not in _DTYPES or q.dtype != k.dtype or q.dtype != v.dtype:
        raise ValueError(
            f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}: pass one floating-point dtype of 16 bits or more"
        )
    if q.device != k.device or q.device != v.device or q.device != layout.device:
        raise ValueError(
            f"q, k, v and the layout are on {q.device}, {k.device}, {v.device} and {layout.device}: move them to one"
        )


def _check_settings(window: int | None, softcap: float | None, scale: float | None, dropout_p: float) -> None:
    if window is not None and (isinstance(window, float) or window < 0):
        raise ValueError(f"window={window} is no number of positions: pass how many to each side, or None")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap={softcap} is not a positive number: pass None for no cap")
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"scale={scale} is not a positive number: pass None for 1/sqrt(head_dim)")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p={dropout_p} is not a probability below 1: pass 0 for none")
