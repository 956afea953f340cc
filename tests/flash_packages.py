"""Stand-ins for the flash-attn packages: their public signatures, and their documented meaning computed in PyTorch.

The signatures are those of flash_attn 2.7 … 2.8 and of FlashAttention-3's flash_attn_interface. The computation follows
what their documentation says of each argument, not what ours means by it: windows as (left, right) positions, both ends
included and −1 for no limit; the causal triangle aligned to the bottom right; softcap on the scaled logits.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


def install(
    monkeypatch: Any, package: str, function: Callable[..., Any], record: bool = True
) -> list[inspect.BoundArguments]:
    """Make ``package`` importable with ``function`` in it; the list fills with the arguments of every call."""
    calls: list[inspect.BoundArguments] = []
    signature = inspect.signature(function)

    def recorded(*args: Any, **kwargs: Any) -> Any:
        calls.append(signature.bind(*args, **kwargs))
        return function(*args, **kwargs)

    recorded.__signature__ = signature
    module = ModuleType(package)
    module.__spec__ = ModuleSpec(package, None)
    module.flash_attn_varlen_func = recorded if record else function
    monkeypatch.setitem(sys.modules, package, module)
    return calls


def flash_attn_2(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    """flash_attn.flash_attn_varlen_func; return_attn_probs adds log-sum-exp (heads, tokens) and a dropout mask."""
    assert alibi_slopes is None
    assert block_table is None
    assert not (dropout_p and softcap), "Softcapping does not support dropout for now"
    if max_seqlen_q == 1 and q.shape[1] > k.shape[1] and window_size == (-1, -1) and not dropout_p:
        q.view(len(cu_seqlens_q) - 1, k.shape[1], -1, q.shape[2])  # it swaps heads and queries: one token a sequence
    out, lse = _attend(
        q, k, v, cu_seqlens_q, cu_seqlens_k, (max_seqlen_q, max_seqlen_k), softmax_scale, causal, window_size, softcap,
        dropout_p,
    )  # fmt: skip
    return (out, lse, None) if return_attn_probs else out


def flash_attn_3(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    seqused_q=None,
    seqused_k=None,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    return_attn_probs=False,
):
    """flash_attn_interface.flash_attn_varlen_func; with return_attn_probs also log-sum-exp (heads, tokens)."""
    assert (seqused_q, seqused_k, qv, attention_chunk, num_splits, pack_gqa) == (None, None, None, 0, 1, None)
    assert q.shape[2] % 8 == 0, "head_size should be a multiple of 8"
    out, lse = _attend(
        q, k, v, cu_seqlens_q, cu_seqlens_k, (max_seqlen_q, max_seqlen_k), softmax_scale, causal, window_size, softcap
    )
    return (out, lse) if return_attn_probs else out


def early_flash_attn_3(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    seqused_q=None,
    seqused_k=None,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
):
    """flash_attn_interface.flash_attn_varlen_func as it was beside flash_attn 2.8: it returns the output alone."""
    return flash_attn_3(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k, softmax_scale, causal,
        qv, q_descale, k_descale, v_descale, window_size, attention_chunk, softcap, num_splits, pack_gqa,
        deterministic, sm_margin,
    )  # fmt: skip


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    longest: tuple[int, int],
    scale: float | None,
    causal: bool,
    window: tuple[int, int],
    softcap: float,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    assert all(x.dtype in (torch.float16, torch.bfloat16) and x.stride(-1) == 1 for x in (q, k, v))
    assert all(x.dtype == torch.int32 and x.is_contiguous() for x in (cu_seqlens_q, cu_seqlens_k))
    assert q.shape[2] <= 256
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    assert len(bounds_q) > 1, "batch size must be positive"
    assert (bounds_q[-1], bounds_k[-1]) == (q.shape[0], k.shape[0])
    assert max(longest) < 2**31
    group = q.shape[1] // k.shape[1]
    outputs, sums = [], []
    for i in range(len(bounds_q) - 1):
        b_q = q[bounds_q[i] : bounds_q[i + 1]].float()
        b_k, b_v = (x[bounds_k[i] : bounds_k[i + 1]].float().repeat_interleave(group, 1) for x in (k, v))
        assert b_q.shape[0] <= longest[0]
        assert b_k.shape[0] <= longest[1]
        scores = torch.einsum("qhd,khd->hqk", b_q, b_k) * (1 / math.sqrt(q.shape[2]) if scale is None else scale)
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~_seen(b_q.shape[0], b_k.shape[0], causal, window), float("-inf"))
        weights = torch.nn.functional.dropout(scores.softmax(-1), dropout_p)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, b_v).to(q.dtype))
        sums.append(scores.logsumexp(-1))
    return torch.cat(outputs), torch.cat(sums, dim=1)


def _seen(queries: int, keys: int, causal: bool, window: tuple[int, int]) -> Tensor:
    """(queries, keys): key j is within [i + keys − queries − left, i + keys − queries + right]."""
    left, right = window
    if causal:
        right = 0
    distance = torch.arange(keys) - (torch.arange(queries)[:, None] + keys - queries)
    seen = torch.ones_like(distance, dtype=torch.bool)
    if left >= 0:
        seen &= distance >= -left
    if right >= 0:
        seen &= distance <= right
    return seen
