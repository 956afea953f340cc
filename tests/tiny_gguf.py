"""Write a tiny Llama as a GGUF file, the way llama.cpp's converter lays one out, unquantised."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import load_file
from transformers import PreTrainedModel

_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf(
    checkpoint: Path,
    path: Path,
    keys: Mapping[str, object] | None = None,
    tensors: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Convert a Llama folder with a byte-level tokenizer, with further keys (of the architecture) and tensors."""
    config = json.loads((checkpoint / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    _add_tokenizer(writer, json.loads((checkpoint / "tokenizer.json").read_text()))
    for name, value in (keys or {}).items():
        _add_key(writer, f"llama.{name}", value)
    for name, tensor in (tensors or {}).items():
        writer.add_tensor(name, tensor)
    for name, weight in load_file(checkpoint / "model.safetensors").items():
        writer.add_tensor(_gguf_name(name), _gguf_layout(name, weight, config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: dict) -> None:
    vocabulary, special = tokenizer["model"]["vocab"], {token["id"] for token in tokenizer["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(vocabulary, key=vocabulary.__getitem__))
    writer.add_token_types([gguf.TokenType.CONTROL if i in special else gguf.TokenType.NORMAL for i in range(384)])
    writer.add_token_merges(
        [pair if isinstance(pair, str) else " ".join(pair) for pair in tokenizer["model"]["merges"]]
    )
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _add_key(writer: gguf.GGUFWriter, name: str, value: object) -> None:
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    add[type(value)](name, value)


def llama3_factors(config: dict, scaling: dict) -> np.ndarray:
    """rope_freqs.weight, as llama.cpp's convert_hf_to_gguf.py computes it for Llama 3.1 (`generate_extra_tensors`)."""
    base, dim = config["rope_theta"], config["hidden_size"] // config["num_attention_heads"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    factor, old_context_len = scaling["factor"], scaling["original_max_position_embeddings"]
    rope_factors = []
    for freq in 1.0 / (base ** (np.arange(0, dim, 2, dtype=np.float32) / dim)):
        wavelen = 2 * np.pi / freq
        if wavelen < old_context_len / high:
            rope_factors.append(1)
        elif wavelen > old_context_len / low:
            rope_factors.append(factor)
        else:
            smooth = (old_context_len / wavelen - low) / (high - low)
            rope_factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(rope_factors, dtype=np.float32)


def _gguf_name(name: str) -> str:
    outer, _, kind = name.rpartition(".")
    if outer in _OUTER:
        return f"{_OUTER[outer]}.{kind}"
    _, _, layer, part = outer.split(".", 3)
    return f"blk.{layer}.{_LAYER[part]}.{kind}"


def _gguf_layout(name: str, weight: np.ndarray, config: dict) -> np.ndarray:
    """llama.cpp turns neighbouring pairs of a head, transformers its two halves: rows of q and k change places."""
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    count = heads.get(name.split(".")[-2])
    if count is None:
        return weight
    rows, columns = weight.shape
    return weight.reshape(count, 2, rows // count // 2, columns).swapaxes(1, 2).reshape(rows, columns).copy()


def write_family(model: PreTrainedModel, architecture: str, tokenizer: Path, path: Path, keys: dict) -> None:
    """Convert a random decoder of another family, whose q and k stay as they are, with ``keys`` beside the usual."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    for name, value in keys.items():
        _add_key(writer, f"{architecture}.{name}", value)
    _add_tokenizer(writer, json.loads((tokenizer / "tokenizer.json").read_text()))
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        base, _, suffix = name.rpartition(".")
        shift = (
            1 if "gemma" in architecture and "norm" in name else 0
        )  # llama.cpp's norms multiply, Gemma's add 1 first
        writer.add_tensor(f"{names.get_name(f'model.{base}')}.{suffix}", weight.numpy() + np.float32(shift))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
