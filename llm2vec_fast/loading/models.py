"""From a name or a path to a decoder with its tokenizer: folders, hub names, adapters, GGUF files; clear refusals."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from llm2vec_fast.errors import ModelLoadError

from .adapters import merged, put_on
from .configuration import read_config
from .devices import refuse_weights_elsewhere
from .files import ADAPTER_CONFIG, CONFIG, MODULES, SETTINGS_FILE, Source, one_line
from .gguf import GgufContent, gguf_arguments, weights_dequantised
from .hub import HubOptions
from .origin import Origin, remember
from .quiet import quiet
from .settings import CHECKPOINT, checked_settings
from .stack import Stack, resolve
from .tokenizer import check_vocabulary, load_tokenizer


@dataclass
class Loaded:
    """A decoder, its tokenizer, the name its checkpoint was published under, and the saved encoder settings."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    checkpoint: str
    settings: dict[str, Any] = field(default_factory=dict)


def load(
    base: str | Path,
    adapter: str | Path | None = None,
    *,
    merge: bool,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    head: bool = False,
    **kwargs: Any,
) -> Loaded:
    """Load a decoder, without its output layer unless asked for.

    Args:
        base: a folder, a hub name, a GGUF file, or an adapter's folder or hub name. Such an adapter names its own base;
            it is merged into it.
        adapter: an adapter to put on top, in peft's key style or in that of the original training scripts: a folder, a
            hub name, or the name of one that comes with the library.
        merge: merge ``adapter`` into the weights.
        dtype: what the weights are loaded in.
        trust_remote_code: run code that comes with the checkpoint.
        head: with the output layer, as training by masked tokens needs it.
        kwargs: those of `HubOptions` (revision, token, cache_dir …) for every file that is read; ``gguf_file``; the
            others are passed on to ``AutoModel.from_pretrained``.

    Raises:
        ModelLoadError: something is missing, damaged, or stored as pickle.
    """
    hub, gguf_file = HubOptions.taken_from(kwargs), kwargs.pop("gguf_file", None)
    stack = resolve(base, adapter, hub, code=trust_remote_code, gguf_file=gguf_file)
    return load_stack(
        stack, merge=merge, dtype=dtype, trust_remote_code=trust_remote_code, head=head,
        code_revision=hub.code_revision, **kwargs,
    )  # fmt: skip


def load_stack(stack: Stack, *, merge: bool, dtype: torch.dtype, head: bool = False, **kwargs: Any) -> Loaded:
    """The same of what was found by `resolve`."""
    trust = bool(kwargs.get("trust_remote_code"))
    kind = AutoModelForCausalLM if head else AutoModel
    model: nn.Module = load_decoder(stack.decoder, kind, dtype=dtype, **kwargs)
    tokenizer = load_tokenizer(stack.tokenizer_sources, trust_remote_code=trust)
    below = [*stack.merged, *([stack.adapter] if stack.adapter and merge else [])]
    for adapter in below:
        model = merged(put_on(model, adapter))
    remember(model, Origin(stack.decoder, tuple(below), {"dtype": dtype, **kwargs}))
    if stack.adapter and not merge:
        model = put_on(model, stack.adapter)
    refuse_weights_elsewhere(model, stack.named.name)
    check_vocabulary(tokenizer, model, stack.named.name)
    _tell_of_modules(stack)
    where = f"{(stack.adapter or stack.named).name}/{SETTINGS_FILE}"
    settings = checked_settings(stack.settings(), where)
    checkpoint = settings.pop(CHECKPOINT, None) or _published_name(stack)
    return Loaded(model, tokenizer, checkpoint, settings)


def _tell_of_modules(stack: Stack) -> None:
    """A folder of sentence-transformers says how to pool in files that are not read here."""
    if not stack.named.is_gguf and stack.named.file(MODULES) and not stack.settings():
        warnings.warn(
            f"{stack.named.name} was saved by sentence-transformers, whose settings ({MODULES}, pooling, prompts) are "
            "not read: pass pooling_mode, max_length and enable_bidirectional as it was trained with",
            stacklevel=2,
        )


def load_decoder(source: Source, kind: type = AutoModel, **kwargs: Any) -> PreTrainedModel:
    """The weights of a source, every parameter of them, and nothing of its file left out that changes results.

    Raises:
        ModelLoadError: something is missing, damaged, left over, or stored as pickle.
    """
    if not source.is_gguf:
        _refuse_unusable_folder(source)
    try:
        with quiet():
            model, found = _read_gguf(source, kind, kwargs) if source.is_gguf else _read_folder(source, kind, kwargs)
    except ModelLoadError:
        raise
    except Exception as error:  # the readers of damaged files raise anything
        raise ModelLoadError(f"the model {source.name} cannot be loaded: {one_line(error)}") from error
    _refuse_incomplete(model, found, source)
    model.config._name_or_path = model.name_or_path = source.name  # of a hub's, not of a folder in its cache
    return model


def _read_folder(source: Source, kind: type, kwargs: dict[str, Any]) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    options = {"local_files_only": True, **kwargs}
    code = {name: options.pop(name) for name in ("trust_remote_code", "code_revision") if name in options}
    kept = {name: options.pop(name) for name in ("dtype", "quantization_config") if name in options}
    config = options.pop("config", None)
    if config is None:
        config, options = read_config(source, **code, **options)
    # Our attention takes its place later. What a file names here may be machine code to fetch from a hub.
    config._attn_implementation = "eager"
    if getattr(config, "_experts_implementation", None) is not None:
        config._experts_implementation = None
    options = {"use_safetensors": True, "local_files_only": True, **options, **code, **kept}
    return kind.from_pretrained(str(source.place), config=config, output_loading_info=True, **options)


def _read_gguf(source: Source, kind: type, kwargs: dict[str, Any]) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    where = gguf_arguments(source.place)
    config = AutoConfig.from_pretrained(**where)
    content = GgufContent(source.place)
    options = {**weights_dequantised(), "attn_implementation": "eager", **kwargs}
    config = content.corrected(config)
    model, found = kind.from_pretrained(**where, config=config, output_loading_info=True, **options)
    content.refuse_unread_tensors(model)
    return model, found


def _refuse_incomplete(model: nn.Module, found: Mapping[str, Any], source: Source) -> None:
    if found["missing_keys"]:
        names = sorted(found["missing_keys"])
        raise ModelLoadError(
            f"the model {source.name} has no weights for {len(names)} of its parameters ({names[0]}, …): the folder is "
            "incomplete, or its configuration belongs to another model"
        )
    mismatched = found.get("mismatched_keys")
    if mismatched:
        raise ModelLoadError(
            f"the model {source.name} has weights of another shape than its configuration says "
            f"({sorted(mismatched)[0]})"
        )
    layers = {name: module for name, module in model.named_modules() if next(module.children(), None) is None}
    left = [key for key in sorted(found.get("unexpected_keys") or ()) if _belongs_to(key, layers)]
    if left:
        raise ModelLoadError(
            f"the model {source.name} holds {left[0]} and {len(left) - 1} other weights that {type(model).__name__} "
            "would leave out: its configuration belongs to another model"
        )


def _belongs_to(key: str, layers: Mapping[str, nn.Module]) -> bool:
    """Whether a weight that went unused is one of a layer that is there, such as the bias of one without."""
    parent = key.rpartition(".")[0]
    module = layers.get(parent) or layers.get(parent.partition(".")[2])
    return module is not None and next(module.parameters(recurse=False), None) is not None


def _refuse_unusable_folder(source: Source) -> None:
    folder = source.place
    config = source.json(CONFIG)
    if config is None:
        left = next(iter(sorted(folder.glob(".*.partial"))), None)
        cut = f"; a save into it was cut off, and {left} holds what it wrote: move that here" if left else ""
        raise ModelLoadError(f"the model folder {source.name} has no {CONFIG}: it is not a transformers model{cut}")
    if source.file(ADAPTER_CONFIG):
        raise ModelLoadError(f"the model folder {source.name} holds an adapter, too: keep them apart")
    named = config.get("transformers_weights")
    if named is not None and not str(named).endswith((".safetensors", ".safetensors.index.json")):
        raise ModelLoadError(f"{source.name}/{CONFIG} names {named} as its weights: only *.safetensors are read")
    if not any(folder.glob("*.safetensors")):
        pickles = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
        if pickles:
            raise ModelLoadError(
                f"the model folder {source.name} has its weights only as pickle ({pickles[0].name}), which can run any "
                "code when read: convert it where you trust it, with "
                "AutoModel.from_pretrained(...).save_pretrained(...)"
            )
        raise ModelLoadError(f"the model folder {source.name} has no weights: a *.safetensors file is expected")


def _published_name(stack: Stack) -> str:
    """The name in the saved configuration, which a local copy of a checkpoint keeps; else the one it was loaded by."""
    for source in (stack.named, stack.decoder):
        if source.commit is not None:
            continue  # on the hub it is named as it is; what its configuration says may be its author's own folder
        name = (source.json(CONFIG) or {}).get("_name_or_path")
        if isinstance(name, str) and name:
            return name
    return stack.decoder.name
