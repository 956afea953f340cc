"""A Hugging Face decoder attends both ways, on packed or padded batches, with no subclass and no copied model code.

transformers lets a registered function replace the attention of every decoder that goes through its attention
interface. Ours runs `kernels.attention` on a `SequenceLayout`. A hook in front of the decoder builds that layout once a
forward pass, from whatever describes the batch, and hands it to every layer as a keyword argument.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from .errors import UnsupportedModelError, UserError
from .kernels import attention
from .kernels.layout import SequenceLayout
from .model_support import WatchedLayout, check_by_trial, check_stated
from .own_config import give_back_config, take_own_config
from .rope import positions_from_zero, rope_by_batch, rope_by_own_length

ATTENTION_NAME = "llm2vec_fast"
_TRIAL_NAME = "llm2vec_fast_trial"
# Arguments some models pass to their attention that change its result and that we do not compute.
_UNSUPPORTED_ARGUMENTS = ("s_aux", "position_bias", "alibi", "cache", "indices")
_POSITIONAL = ("input_ids", "attention_mask", "position_ids")


def make_bidirectional(model: nn.Module, enabled: bool = True) -> nn.Module:
    """Let a decoder attend both ways, in place, on packed and padded batches.

    Works on any transformers (5.2 or newer) decoder whose attention goes through the attention interface: Llama,
    Mistral, Qwen2, Qwen3, Gemma 2 and 3, Phi-3 and their like, bare, with a head, or inside a peft model. Afterwards it
    takes, besides stock arguments, a packed batch: ``model(input_ids=(1, T), layout=SequenceLayout)``, or the
    ``position_ids`` that restart at 0 with each text. The cache is off unless asked for. ``config.is_causal`` records
    the choice and is saved with the model, so stock transformers, vLLM and others honour it too. It is a configuration
    of the model's own, a copy: other models built from the same object, before or later, stay as they are. Rope types
    that depend on length, longrope and dynamic NTK, take each text's own: ``position_ids`` beside a ``layout`` rise
    within a text. After ``set_attn_implementation`` of another attention the model is a stock one again, on padded
    batches, in the direction that its configuration states.

    ``torch.compile(model, fullgraph=True, dynamic=True)`` compiles it once for batches of any lengths, if each has
    its ``layout``: finding the lengths in a mask or in positions needs their values, which a compiled graph has not.

    Args:
        model: the decoder; changed in place.
        enabled: False keeps it causal (the paper's baseline) on the same fast path.

    Returns:
        The same model.

    Raises:
        UnsupportedModelError: its attention does not go through the interface, some of its layers are not attention, or
            a trial of a few tokens fails, mixes texts, or shows a part that our attention leaves out (ALiBi and other
            biases, sinks, masks of a layer's own). The model is then as it was.
    """
    decoder = decoder_of(model)
    check_stated(decoder, enabled)
    before, shared = attention_of(decoder), take_own_config(model, decoder)
    try:
        decoder.config.is_causal = not enabled
        decoder._rope_by_length = rope_by_own_length(decoder)
        if _prepare_inputs not in decoder._forward_pre_hooks.values():
            decoder.register_forward_pre_hook(_prepare_inputs, with_kwargs=True)
        decoder.set_attn_implementation(_TRIAL_NAME)
        check_by_trial(decoder, enabled)
        decoder.set_attn_implementation(ATTENTION_NAME)
    except BaseException:
        put_back_attention(decoder, before)
        give_back_config(shared)
        raise
    return model


def attention_of(decoder: PreTrainedModel) -> tuple[str, dict[str, Any], bool]:
    """What `make_bidirectional` changes on a decoder, for `put_back_attention`."""
    config = decoder.config
    direction = {"is_causal": config.is_causal} if "is_causal" in vars(config) else {}
    return config._attn_implementation, direction, _prepare_inputs in decoder._forward_pre_hooks.values()


def put_back_attention(decoder: PreTrainedModel, before: tuple[str, dict[str, Any], bool]) -> None:
    """Undo `make_bidirectional`."""
    implementation, direction, prepared = before
    decoder.set_attn_implementation(implementation)
    vars(decoder.config).pop("is_causal", None)
    vars(decoder.config).update(direction)
    if prepared:
        return
    rope_by_batch(decoder)
    decoder.__dict__.pop("_rope_by_length", None)
    for key in [key for key, hook in decoder._forward_pre_hooks.items() if hook is _prepare_inputs]:
        del decoder._forward_pre_hooks[key]
        decoder._forward_pre_hooks_with_kwargs.pop(key, None)


def decoder_of(model: nn.Module) -> PreTrainedModel:
    """The transformers model that embeds tokens and runs the layers, inside heads, peft wrappers and multimodal models.

    Raises:
        UnsupportedModelError: there is none.
    """
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    if not isinstance(model, PreTrainedModel):
        inner = next((name for name in ("_orig_mod", "module") if hasattr(model, name)), None)
        what = f"the model that it wraps, its .{inner}" if inner else "a PreTrainedModel"
        raise UnsupportedModelError(f"{type(model).__name__} is not a transformers model: pass {what}")
    return model.get_decoder()


def runs_our_attention(decoder: PreTrainedModel) -> bool:
    """Whether `make_bidirectional` changed this very decoder; one built from its configuration has the name alone."""
    prepared = _prepare_inputs in decoder._forward_pre_hooks.values()
    return prepared and decoder.config._attn_implementation == ATTENTION_NAME


def require_packed_attention(model: nn.Module) -> None:
    """Refuse a decoder whose attention was changed since: another would look across the texts of a packed batch.

    Raises:
        UserError: the message names the attention that it runs.
    """
    decoder = decoder_of(model)
    if not runs_our_attention(decoder):
        raise UserError(_changed_since(decoder))


def _changed_since(decoder: PreTrainedModel) -> str:
    return (
        f"{type(decoder).__name__} no longer runs this library's attention but "
        f"{decoder.config._attn_implementation!r}: call make_bidirectional(model) again"
    )


def _prepare_inputs(decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Before each forward pass: describe the batch by one layout, whatever the caller gave."""
    kwargs = {**dict(zip(_POSITIONAL, args, strict=False)), **kwargs}
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    given = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
    layout = kwargs.get("layout")
    if decoder.config._attn_implementation not in (ATTENTION_NAME, _TRIAL_NAME):  # the user has set another since
        if layout is not None or _would_mix(decoder, mask, positions):
            raise UserError(_changed_since(decoder))
        return args, kwargs
    if layout is None:
        layout = _layout_of(given.shape[0], given.shape[1], mask, positions, given.device)
    elif mask is not None:
        raise ValueError("both layout and attention_mask were passed: pass the one that describes the batch")
    elif layout.total != given.shape[0] * given.shape[1]:
        raise ValueError(
            f"the layout has {layout.total} rows, the batch {tuple(given.shape[:2])}: a packed batch is (1, tokens)"
        )
    if positions is None:
        kwargs["position_ids"] = layout.position_ids.view(given.shape[:2])
    elif getattr(decoder, "_rope_by_length", False):
        kwargs["position_ids"] = positions_from_zero(positions, layout, given.shape[:2])
    kwargs["layout"], kwargs["attention_mask"] = layout, None
    if kwargs.get("use_cache") is None:  # heads pass on None, which would mean the configuration's True
        kwargs["use_cache"] = False
    return (), kwargs


def _would_mix(decoder: nn.Module, mask: Tensor | None, positions: Tensor | None) -> bool:
    """Whether texts packed into a row, told by their positions, reach a stock attention that looks across them.

    Stock transformers keeps such texts apart with flash-attn, or where it attends to earlier tokens only.
    """
    config = decoder.config
    if mask is not None or positions is None or getattr(config, "is_causal", True) or torch.compiler.is_compiling():
        return False
    return "flash" not in str(config._attn_implementation) and bool((positions[..., 1:] == 0).any())


def _layout_of(
    batch: int, length: int, mask: Tensor | None, positions: Tensor | None, device: torch.device
) -> SequenceLayout:
    if mask is not None:
        if mask.ndim != 2 or mask.shape != (batch, length):
            raise ValueError(f"attention_mask has shape {tuple(mask.shape)}: pass a 2-D mask of shape {batch, length}")
        return SequenceLayout.from_attention_mask(mask.to(device))
    if positions is not None and batch == 1:
        return SequenceLayout.from_position_ids(positions.to(device))
    if positions is not None and bool((positions[:, 1:] == 0).any()):
        raise ValueError(
            f"position_ids restart inside a batch of {batch} rows: pack all texts into one row, or pass a layout"
        )
    return SequenceLayout.from_shape(batch, length, device)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    layout: SequenceLayout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: q (B, Hq, S, D), k and v (B, Hkv, S, D) → (B, S, Hq, D)."""
    if layout is None:
        raise ValueError(
            f"{type(module).__name__} got no layout: call model(...) and not model.forward(...), which passes over the "
            "hook that makes it; if the model was built from the configuration of one that runs this library's "
            "attention, call make_bidirectional(model), or model.set_attn_implementation('sdpa')"
        )
    if attention_mask is not None:  # the decoder was given none: the layer made it
        raise UnsupportedModelError(
            f"{type(module).__name__} makes a mask of its own, which {ATTENTION_NAME} does not compute"
        )
    for name in _UNSUPPORTED_ARGUMENTS:
        if kwargs.get(name) is not None:
            raise UnsupportedModelError(
                f"{type(module).__name__} passes {name} to its attention, which {ATTENTION_NAME} does not compute"
            )
    if key.shape[2] != query.shape[2]:
        raise ValueError(
            f"attention got {key.shape[2]} keys for {query.shape[2]} queries: pass use_cache=False, an encoder has none"
        )
    width = value.shape[3]
    if width < query.shape[3]:  # multi-head latent attention: zeros add nothing to the sum of values
        value = F.pad(value, (0, query.shape[3] - width))
    causal = getattr(module.config, "is_causal", True)
    out = attention(
        _rows(query),
        _rows(key),
        _rows(value),
        layout,
        causal=causal,
        window=_window(module.config, sliding_window, causal),
        softcap=softcap,
        scale=scaling,
        dropout_p=dropout,
    )
    return out.view(query.shape[0], query.shape[2], query.shape[1], value.shape[3])[..., :width], None


def _attend_watched(module: nn.Module, *args: Any, layout: SequenceLayout | None = None, **kwargs: Any) -> tuple:
    """`_attend` in a trial."""
    if layout is None:
        raise UnsupportedModelError(f"{type(module).__name__} is not handed the keyword arguments of the forward pass")
    known = ("attention_mask", "position_ids")
    given = [name for name, value in kwargs.items() if isinstance(value, Tensor) and name not in known]
    if given:  # by the layer: a trial passes none
        raise UnsupportedModelError(
            f"{type(module).__name__} passes {given[0]} to its attention, which {ATTENTION_NAME} does not compute"
        )
    if isinstance(layout, WatchedLayout):
        layout.windows.append(kwargs.get("sliding_window"))
    return _attend(module, *args, layout=layout, **kwargs)


def _rows(x: Tensor) -> Tensor:
    """(B, H, S, D) → (B·S, H, D), a view wherever x is one of a projection's output."""
    return x.transpose(1, 2).flatten(0, 1)


def _window(config: PreTrainedConfig, sliding_window: int | None, causal: bool) -> int | None:
    """How far a token sees. Stock masks: W − 1 back if causal; W both ways, but W − 1 in EmbeddingGemma's own mask."""
    if sliding_window is None:
        return None
    exclusive = causal or getattr(config, "use_bidirectional_attention", None) is True  # Gemma 4 has words there
    return sliding_window - 1 if exclusive else sliding_window


# On import: a pickled model names `_prepare_inputs`, so that unpickling it in a fresh process registers this too.
AttentionInterface.register(ATTENTION_NAME, _attend)
AttentionInterface.register(_TRIAL_NAME, _attend_watched)
