"""A model's config.json, with what transformers no longer understands by its present name."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from .files import CONFIG, Source


def read_config(source: Source, **options: Any) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """The configuration of a folder, and the options that it has no use for."""
    if options.get("trust_remote_code") or not names_old_rope(source):
        return AutoConfig.from_pretrained(source.place, return_unused_kwargs=True, **options)
    content = source.json(CONFIG) or {}
    scaling = {**content["rope_scaling"], "type": "longrope"}
    kind = CONFIG_MAPPING[content["model_type"]]
    return kind.from_dict({**content, "rope_scaling": scaling}, return_unused_kwargs=True, **options)


def names_old_rope(source: Source) -> bool:
    """Whether longrope is called "su", as in the first files of Phi-3: transformers refuses them by its own check."""
    scaling = (source.json(CONFIG) or {}).get("rope_scaling")
    return isinstance(scaling, dict) and scaling.get("type") == "su"
