"""Which decoders can attend both ways here, found out before the first text: by what they state, then by a trial.

The trial runs a dozen tokens through the first layer of each kind: three texts packed into one batch must not see
each other, and a text's last token must reach its first exactly if the decoder is to attend both ways. So a family that
mixes tokens where our attention has no say, or hands it less than it needs, is refused by name, not met in a vector.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from .errors import UnsupportedModelError
from .kernels.layout import SequenceLayout
from .rope import rope_by_longest

# The mixers our attention computes. Others (linear attention, state spaces, convolutions, chunks) look back only.
SUPPORTED_LAYER_TYPES = {"full_attention", "sliding_attention"}
_TEXT = 4  # tokens of each of the three texts of a trial
# How far rows may differ that nothing touched, relatively: experts multiply other numbers of rows at once. It is the
# published tolerance, or four roundings of a 16-bit model.
_TOLERANCE, _ROUNDINGS = 1e-4, 4


@dataclass(frozen=True, eq=False)
class WatchedLayout(SequenceLayout):
    """The layout of a trial, which keeps what each layer's attention was given.

    Attributes:
        windows: the sliding window of each call, or None.
    """

    windows: list[int | None] = field(default_factory=list)

    def to(self, device: torch.device | str) -> WatchedLayout:
        """On another device, where device_map put a layer, with the same record."""
        there = super().to(device)
        return WatchedLayout(there.starts, there.lengths, self.max_length, self.total, self.padded_shape, self.windows)


def named(decoder: nn.Module) -> str:
    """How a refusal calls the model."""
    kind = getattr(decoder.config, "model_type", "")
    return f"{type(decoder).__name__} (model type {kind})" if kind else type(decoder).__name__


def check_stated(decoder: PreTrainedModel, bidirectional: bool) -> None:
    """Refuse what its configuration and modules say cannot work.

    Raises:
        UnsupportedModelError: the message names the model and the reason.
    """
    name, config = named(decoder), decoder.config
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name} is an encoder-decoder model: pass a decoder-only model")
    if not getattr(decoder, "_supports_attention_backend", False):
        raise UnsupportedModelError(
            f"{name} does not use transformers' attention interface and would stay causal: "
            "pass a model that does, such as a Llama, Mistral, Qwen, Gemma or Phi-3"
        )
    encoder = getattr(config, "is_decoder", None) is False
    if encoder and not bidirectional:
        raise UnsupportedModelError(f"{name} is an encoder and is never causal: call make_bidirectional on it first")
    other = sorted(set(getattr(config, "layer_types", None) or ()) - SUPPORTED_LAYER_TYPES)
    if not other:
        other = sorted({type(m).__name__ for m in decoder.modules() if _looks_back_only(m)})
    if other:
        raise UnsupportedModelError(
            f"{name} has {', '.join(other)} layers, which cannot attend both ways: pass a model with attention only"
        )


def _looks_back_only(module: nn.Module) -> bool:
    """Causal convolutions and attention sinks, as state-space hybrids and gpt-oss have them."""
    return isinstance(module, nn.Conv1d) or hasattr(module, "sinks")


def check_by_trial(decoder: PreTrainedModel, bidirectional: bool) -> None:
    """Refuse what a trial shows to fail, to mix texts, to look one way only, or to count positions otherwise.

    Nothing is tried where a few tokens cannot be computed: weights that are not there, in parts, or quantised.

    Raises:
        UnsupportedModelError: the message names the model and the reason.
    """
    if not _can_be_tried(decoder):
        return
    tried = _with_few_layers(decoder)
    plain = torch.autocast(_device(decoder).type, enabled=False)  # what a model is does not depend on who asks
    with torch.no_grad(), plain, _evaluating(decoder):
        try:
            found = _problem(tried, bidirectional)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except UnsupportedModelError as error:
            found = f"cannot attend here ({error})"
        except Exception as error:  # models fail in any way on what they did not expect
            found = f"fails on packed texts ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    if found:
        raise UnsupportedModelError(
            f"{named(decoder)} {found}: pass another model, such as a Llama, Mistral, Qwen, Gemma or Phi-3"
        )


def _can_be_tried(decoder: nn.Module) -> bool:
    tensors = list(decoder.parameters())
    absent = any(x.is_meta or isinstance(x, DTensor) or hasattr(x, "ds_id") for x in tensors)  # FSDP2, DeepSpeed
    return bool(tensors) and not absent and not getattr(decoder, "is_quantized", False)


def _problem(decoder: nn.Module, bidirectional: bool) -> str | None:
    """What is wrong with the decoder, as the rest of a sentence that begins with its name."""
    size = min(decoder.get_input_embeddings().weight.shape[0], 256)
    ids = [(5 + 7 * i) % size for i in range(3 * _TEXT)]  # before, a text, behind
    around = [(i + 1) % size if not _TEXT <= row < 2 * _TEXT else i for row, i in enumerate(ids)]
    text, last_row = slice(_TEXT, 2 * _TEXT), 2 * _TEXT - 1
    first, last = _changed(ids, _TEXT, size), _changed(ids, last_row, size)
    layout = _layout(decoder)
    plain, other = _run(decoder, ids, layout), _run(decoder, around, layout)
    if not layout.windows:
        return "never calls transformers' attention interface and would stay causal"
    if _differ(plain[text], other[text]):
        return "lets a text see the texts packed beside it"
    ahead = _run(decoder, last, layout)[_TEXT]
    if not bidirectional and _differ(plain[_TEXT], ahead):
        return "attends both ways and cannot be causal"
    if bidirectional and torch.equal(plain[_TEXT], ahead):
        back = _run(decoder, first, layout)[last_row]
        if not torch.equal(plain[last_row], back):  # else its attention adds nothing yet: its output starts at zero
            return "attends one way only"
    if _ignores_window(decoder, layout.windows):
        return f"has a sliding window of {decoder.config.sliding_window} tokens that its attention is not told of"
    if _counts_otherwise(decoder, ids):
        return "counts positions in a way of its own, not from 0 with each text"
    if rotary := rope_by_longest(decoder):
        return f"has a rotary embedding, {rotary}, that turns a text by the longest of its batch"
    return None


def _changed(ids: Sequence[int], row: int, size: int) -> list[int]:
    return [(i + 1) % size if at == row else i for at, i in enumerate(ids)]


def _layout(decoder: nn.Module) -> WatchedLayout:
    plain = SequenceLayout.from_lengths([_TEXT] * 3, _device(decoder))
    return WatchedLayout(plain.starts, plain.lengths, plain.max_length, plain.total)


def _device(decoder: nn.Module) -> torch.device:
    return decoder.get_input_embeddings().weight.device


def _run(decoder: nn.Module, ids: list[int], layout: SequenceLayout) -> Tensor:
    given = torch.tensor([ids], device=_device(decoder))
    return decoder(input_ids=given, layout=layout, use_cache=False).last_hidden_state[0]


def _counts_otherwise(decoder: nn.Module, ids: list[int]) -> bool:
    """Whether the model's own positions, those of its forward method without our hook, are others than ours."""
    given = torch.tensor(ids, device=_device(decoder)).view(3, _TEXT)
    batch = {"input_ids": given, "layout": SequenceLayout.from_shape(3, _TEXT, given.device), "use_cache": False}
    return _differ(decoder(**batch).last_hidden_state, decoder.forward(**batch).last_hidden_state)


def _differ(a: Tensor, b: Tensor) -> bool:
    """Whether two results are not the same but for rounding; NaN is equal to NaN."""
    allowed = max(_TOLERANCE, _ROUNDINGS * torch.finfo(a.dtype).eps)
    same_gaps = torch.equal(a.isfinite(), b.isfinite())
    a, b = (torch.where(x.isfinite(), x, 0).double() for x in (a, b))
    return not same_gaps or bool((a - b).norm() > allowed * a.norm())


def _ignores_window(decoder: nn.Module, windows: list[int | None]) -> bool:
    """A window that stock code puts into a mask alone, as PhiMoE does, and that a text may be longer than."""
    config = decoder.config
    window = getattr(config, "sliding_window", None)
    names = inspect.unwrap(type(decoder).forward).__code__.co_names
    masked = "create_sliding_window_causal_mask" in names and not getattr(config, "layer_types", None)
    return bool(masked and window and window < getattr(config, "max_position_embeddings", 0)) and not any(windows)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout; every module's own mode comes back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _with_few_layers(decoder: nn.Module) -> nn.Module:
    """The same decoder, weights and all, that ends behind the first layer of each kind."""
    count = getattr(decoder.config, "num_hidden_layers", None)
    lists = {name: m for name, m in decoder.named_children() if isinstance(m, nn.ModuleList) and len(m) == count}
    if len(lists) != 1:
        return decoder
    ((name, layers),) = lists.items()
    types = getattr(decoder.config, "layer_types", None) or [None] * len(layers)
    kinds = [(kind, *map(type, layer.modules())) for kind, layer in zip(types, layers, strict=False)]
    few: Any = copy.copy(decoder)
    few.__dict__.pop("forward", None)  # device_map puts one on the instance, which runs all layers
    few._modules = {**decoder._modules, name: layers[: 1 + max(map(kinds.index, kinds))]}
    return few
