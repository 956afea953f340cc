"""GGUF files: what transformers reads of them is checked against what they say, and the rest is recovered or refused.

transformers takes the tensors and keys that it knows and leaves out all else without a word, among them the scaling of
rotary frequencies, windows and caps. Names and meanings are those of llama.cpp's converter, convert_hf_to_gguf.py.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from torch import nn
from transformers import PreTrainedConfig

from llm2vec_fast.errors import ModelLoadError

from .gguf_rope import ROPE_TENSORS, apply_rope

# Keys that decide results, and the attributes of a configuration that may hold them.
_NORM = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")
_SAME = {
    "embedding_length": ("hidden_size",),
    "block_count": ("num_hidden_layers",),
    "feed_forward_length": ("intermediate_size",),
    "vocab_size": ("vocab_size",),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.layer_norm_rms_epsilon": _NORM,
    "attention.layer_norm_epsilon": _NORM,
    "attention.key_length": ("head_dim",),
    "attention.value_length": ("head_dim",),
    "attention.sliding_window": ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "use_parallel_residual": ("use_parallel_residual",),
    "expert_count": ("num_experts", "num_local_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_weights_norm": ("norm_topk_prob",),
}
# Keys that decide nothing about the last hidden state.
_INERT = {"attention.causal", "classifier.output_labels", "context_length", "decoder_start_token_id",
          "final_logit_softcapping", "logit_scale", "pooling_type"}  # fmt: skip
# Whose scores are scaled by another number than the width of a head in one size, known by its layers: llama.cpp has it
# in its code (gemma2.cpp, gemma3.cpp), no file tells.
_SCALED_BY_SIZE = {"gemma2": 46, "gemma3": 62}
_OUTER = ("", "model.", "transformer.", "gpt_neox.")


def gguf_arguments(path: Path) -> dict[str, Any]:
    """What transformers wants to be told to read a GGUF file."""
    if importlib.util.find_spec("gguf") is None:
        raise ModelLoadError("reading a GGUF file needs the package gguf: pip install 'llm2vec-fast[gguf]'")
    return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}


def weights_dequantised() -> dict[str, Any]:
    """Releases that have GgufConfig keep quantised weights unless told otherwise, and cannot save those."""
    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


class GgufContent:
    """The keys and the tensors of a file.

    Attributes:
        architecture: llama.cpp's name of it.
        keys: those of the architecture, without its name in front.
        tensors: by name, as the reader of the package gguf gives them.
    """

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        reader = GGUFReader(path)
        self.path = path
        self.architecture = str(_value(reader.fields["general.architecture"]))
        prefix = f"{self.architecture}."
        self.keys = {
            name.removeprefix(prefix): _value(field) for name, field in reader.fields.items() if name.startswith(prefix)
        }
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}

    def corrected(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """The configuration that transformers made of the file, with what it left out.

        Raises:
            ModelLoadError: the file holds a key or a tensor that changes results and has no place there.
        """
        if self.architecture in _SCALED_BY_SIZE:
            by_size = self.keys.get("block_count") == _SCALED_BY_SIZE[self.architecture]
            config.query_pre_attn_scalar = (
                config.hidden_size // config.num_attention_heads if by_size else _attribute(config, "head_dim")
            )
        left = apply_rope(config, self.keys, self._rope_tensors(), self._refusal)
        for name, value in left.items():
            if name in _INERT or self._agrees(config, name, value):
                continue
            if not self._set(config, name, value) and value not in (0, False, "", None):
                raise self._refusal(f"the key {self.architecture}.{name}={value}")
        return config

    def refuse_unread_tensors(self, model: nn.Module) -> None:
        """Refuse a file with tensors that ``model`` has no place for, which transformers leaves out.

        Raises:
            ModelLoadError: the message names one of them.
        """
        known = set(self._tensor_names(model)) | set(ROPE_TENSORS) | {"output.weight", "output.bias"}
        experts = ("_exps", "_shexp", "_inp")  # stored joined and split up by transformers
        lost = [name for name in self.tensors if name not in known and not any(x in name for x in experts)]
        if lost:
            raise self._refusal(f"{len(lost)} tensors such as {lost[0]}")

    def _tensor_names(self, model: nn.Module) -> Iterator[str]:
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        kind = next(kind for kind, name in MODEL_ARCH_NAMES.items() if name == self.architecture)
        names = get_tensor_name_map(kind, int(self.keys.get("block_count", 0)))
        for parameter in model.state_dict():
            base, _, suffix = parameter.rpartition(".")
            for outer in _OUTER:
                found = names.get_name(outer + base)
                if found is not None:
                    yield f"{found}.{suffix}"

    def _agrees(self, config: PreTrainedConfig, name: str, value: Any) -> bool:
        if name == "attention.sliding_window_pattern":
            return getattr(config, "layer_types", None) == _layer_types(value, config.num_hidden_layers)
        return any(_alike(_attribute(config, x), value) for x in _SAME.get(name, ()))

    def _set(self, config: PreTrainedConfig, name: str, value: Any) -> bool:
        """Put a value into the configuration where it has an attribute for it. False where it has none."""
        if name == "attention.sliding_window_pattern" and getattr(config, "layer_types", None):
            config.layer_types = _layer_types(value, config.num_hidden_layers)
            return True
        if name == "attention.sliding_window" and "sliding_attention" not in (
            getattr(config, "layer_types", None) or ["sliding_attention"]
        ):
            return False  # it would be of no effect
        if name not in ("attention.sliding_window", "attn_logit_softcapping", "attention.key_length") and (
            _SAME.get(name) is not _NORM
        ):
            return False  # of another shape than the weights that transformers expects
        place = next((x for x in _SAME[name] if hasattr(config, x)), None)
        if place is None or not value:
            return False
        setattr(config, place, value)
        return True

    def _rope_tensors(self) -> Mapping[str, np.ndarray]:
        found = {name: self.tensors[name] for name in ROPE_TENSORS if name in self.tensors}
        return {name: np.array(tensor.data, np.float64).reshape(-1) for name, tensor in found.items()}

    def _refusal(self, what: str) -> ModelLoadError:
        return ModelLoadError(
            f"the GGUF file {self.path} holds {what}, which would change its embeddings and cannot be read: pass the "
            "model that it was made from, as a folder of safetensors"
        )


def _attribute(config: PreTrainedConfig, name: str) -> Any:
    if name == "head_dim" and getattr(config, "head_dim", None) is None:
        return config.hidden_size // config.num_attention_heads
    return getattr(config, name, None)


def _alike(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, float) or isinstance(theirs, float):
        return isinstance(ours, (int, float)) and math.isclose(ours, theirs, rel_tol=1e-6)  # theirs is a float32
    if isinstance(theirs, list) and len(set(theirs)) == 1:
        return ours == theirs[0]  # the same for every layer
    return ours == theirs


def _layer_types(pattern: int | list[Any], layers: int) -> list[str]:
    """Of every layer, from which of them have a window: each but every n-th, or a list."""
    some = pattern if isinstance(pattern, list) else [bool((i + 1) % pattern) for i in range(layers)]
    return ["sliding_attention" if windowed else "full_attention" for windowed in some[:layers]]


def _value(field: Any) -> Any:
    content = field.contents()
    return content.item() if isinstance(content, np.generic) else content
