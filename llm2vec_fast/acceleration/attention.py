"""Our attention in a decoder that keeps the direction it has, and what was there before."""

from __future__ import annotations

from torch import nn

from ..bidirectional import ATTENTION_NAME, UnsupportedModelError, decoder_of, make_bidirectional
from .swapping import Acceleration

_BEFORE = "_before_attention"


def swap_attention(model: nn.Module, report: Acceleration) -> None:
    """Let the decoder attend through our operation, causal or both ways as its configuration says."""
    try:
        decoder = decoder_of(model)
        config, hooks = decoder.config, set(decoder._forward_pre_hooks)
        if config._attn_implementation == ATTENTION_NAME:
            report.left["attention"] = "it runs our attention already"
            return
        before = config._attn_implementation, {"is_causal": config.is_causal} if "is_causal" in vars(config) else {}
        make_bidirectional(model, enabled=not getattr(config, "is_causal", True))
    except UnsupportedModelError as error:
        report.left["attention"] = str(error)
        return
    decoder.__dict__[_BEFORE] = (*before, tuple(set(decoder._forward_pre_hooks) - hooks))
    report.count("attention")


def restore_attention(module: nn.Module) -> None:
    """Undo `swap_attention`, where it was done."""
    if _BEFORE not in module.__dict__:
        return
    implementation, direction, hooks = module.__dict__.pop(_BEFORE)
    module.set_attn_implementation(implementation)
    vars(module.config).pop("is_causal", None)
    vars(module.config).update(direction)
    for key in hooks:
        module._forward_pre_hooks.pop(key, None)
        module._forward_pre_hooks_with_kwargs.pop(key, None)
