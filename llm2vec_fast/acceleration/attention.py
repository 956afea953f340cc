"""Our attention in a decoder that keeps the direction it has, and what was there before."""

from __future__ import annotations

from torch import nn

from ..bidirectional import (
    UnsupportedModelError,
    attention_of,
    decoder_of,
    make_bidirectional,
    put_back_attention,
    runs_our_attention,
)
from .swapping import Acceleration

_BEFORE = "_before_attention"  # what was there, and the owners that want ours


def swap_attention(model: nn.Module, report: Acceleration) -> None:
    """Let the decoder attend through our operation, causal or both ways as its configuration says."""
    try:
        decoder = decoder_of(model)
        before = attention_of(decoder)
        if runs_our_attention(decoder):
            report.left["attention"] = "it runs our attention already"
            if _BEFORE in decoder.__dict__:
                decoder.__dict__[_BEFORE][1].add(report.owner)
            return
        make_bidirectional(model, enabled=not getattr(decoder.config, "is_causal", True))
    except UnsupportedModelError as error:
        report.left["attention"] = str(error)
        return
    decoder.__dict__[_BEFORE] = (before, {report.owner})
    report.count("attention")


def restore_attention(module: nn.Module, owner: str) -> None:
    """Undo `swap_attention`, where it was done and no other owner wants it."""
    before, owners = module.__dict__.get(_BEFORE, (None, set()))
    owners.discard(owner)
    if before is not None and not owners:
        del module.__dict__[_BEFORE]
        put_back_attention(module, before)
