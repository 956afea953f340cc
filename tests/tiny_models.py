"""Tiny random decoders, one a family, built from configurations alone: no download, a few milliseconds each."""

from __future__ import annotations

import torch
from transformers import CONFIG_MAPPING, AutoModel, PreTrainedModel

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,  # the usual 0.02 leaves attention almost uniform: mistakes in it would not show
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
WINDOW = 5
FAMILIES: dict[str, dict] = {
    "llama": {"model_type": "llama"},
    "llama3-rope": {"model_type": "llama", "rope_parameters": LLAMA3_ROPE},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "mistral-window": {"model_type": "mistral", "sliding_window": WINDOW},
    "qwen2": {"model_type": "qwen2"},
    "qwen2-window": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3"},
    "gemma2": {
        "model_type": "gemma2",
        "sliding_window": WINDOW,
        "attn_logit_softcapping": 2.0,
        "query_pre_attn_scalar": 8,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "query_pre_attn_scalar": 8,
    },
    "phi3": {"model_type": "phi3", "sliding_window": None},
    "phi3-partial": {
        "model_type": "phi3",
        "sliding_window": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    },
}


def tiny_model(family: str, attention: str = "eager", **changes: object) -> PreTrainedModel:
    """A random model of the family, or of a model type, in float32, the same weights at every call."""
    settings = {**SHAPE, **FAMILIES.get(family, {"model_type": family}), **changes}
    config = CONFIG_MAPPING[settings.pop("model_type")](**settings)
    torch.manual_seed(0)
    model = AutoModel.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(mean=1.0, std=0.2)
    return model.eval()
