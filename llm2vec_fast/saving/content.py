"""What a saved encoder's folder holds: a whole model, or an adapter that loads to the weights that are in memory."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from llm2vec_fast.bidirectional import decoder_of
from llm2vec_fast.errors import ModelLoadError
from llm2vec_fast.loading import (
    ADAPTER_WEIGHTS,
    CAUSAL,
    CHECKPOINT,
    CONFIG,
    SETTINGS_FILE,
    Origin,
    adapter_weights,
    merged,
)
from llm2vec_fast.loading.adapter_config import as_saved, lora_config_of
from llm2vec_fast.loading.body import body_of
from llm2vec_fast.loading.joinable import NotJoinableError, update_of
from llm2vec_fast.loading.lowrank import joined

from .base import MERGE, SaveError, base_of_memory, updates_below
from .folder import write_json

# What earlier saves may have left in a folder: read beside new files, it would change what is loaded.
OLD_FILES = (
    CONFIG,
    "generation_config.json",
    "model*.safetensors",
    "model*.safetensors.index.json",
    "adapter_config.json",
    "adapter_model.*",
    SETTINGS_FILE,
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.*",
)


def write_encoder(
    folder: Path,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    published: str | None,
    settings: dict[str, Any] | None,
) -> None:
    """Write a model, its tokenizer and its settings so that they load as they are in memory.

    Args:
        published: the name of the published checkpoint that it is, by which its chat template is found.
        settings: those of the encoder; None for no llm2vec_config.json.

    Raises:
        SaveError: see `write_model`.
    """
    write_model(model, folder)
    write_tokenizer(tokenizer, folder)
    if published is not None:
        keep_published_name(folder, published)
    if settings is not None:
        write_json(folder / SETTINGS_FILE, written_settings(settings, model, published))


def write_model(model: nn.Module, folder: Path) -> None:
    """Write a model so that loading the folder gives the weights that are in memory.

    Without adapters, or with merged ones, that is the whole model. Adapters that are not merged are written alone, as
    one, if the rest of the weights is what the base they are to name holds: that is compared, weight by weight.

    Raises:
        SaveError: what would be loaded from the folder is something else than this model.
    """
    away = next((name for name, weight in model.named_parameters() if weight.is_meta), None)
    if away is not None:
        raise SaveError(f"{away} is on no device (meta, or left on disk), so there is nothing to write: load it whole")
    if not _adapted(model):
        if isinstance(model, PeftModel):
            raise SaveError(f"an adapter of type {model.active_peft_config.peft_type.value} cannot be saved here")
        model.save_pretrained(folder)
        return
    names = active_adapters(model)
    if any(module.merged for module in _tuners(model)):
        raise SaveError(f"the adapter {names[0]} is merged but still in place: {MERGE}, or call its unmerge_adapter()")
    for name in names:
        _require_readable(model, name)
    origin = base_of_memory(model)
    single = isinstance(model, PeftModel) and len(names) == 1 and not origin.merged
    if single and _scaled_as_configured(model, names[0]):
        config, weights = copy.copy(model.peft_config[names[0]]), adapter_weights(model, names[0])
    else:
        config, weights = _as_one(model, names, origin)
    _write_adapter(config, weights, body_of(model) if not single else model.get_base_model(), origin, folder)


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer without its chat template: sentence-transformers would wrap every text in it."""
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)


def merge(model: nn.Module) -> nn.Module:
    """The model alone, its active adapters merged into its weights, for good.

    Raises:
        SaveError: that would give other weights than the model computes with.
    """
    if not _adapted(model):
        return model
    names = active_adapters(model)
    if any(module.merged and set(module.merged_adapters) != set(names) for module in _tuners(model)):
        raise SaveError(f"other adapters than the active {', '.join(names)} are merged: call unmerge_adapter() first")
    if isinstance(model, PeftModel):
        return merged(model)
    return _merged_by_layer(model)


def active_adapters(model: nn.Module) -> list[str]:
    """The adapters that a model computes with.

    Raises:
        SaveError: they are switched off, or not the same in all layers.
    """
    tuners = _tuners(model)
    found = {tuple(module.active_adapters) for module in tuners}
    if any(module.disable_adapters for module in tuners):
        raise SaveError(
            "the model's adapter is switched off, and would be on where it is loaded again: switch it on "
            "(enable_adapter_layers), or take it off (unload)"
        )
    wrappers = [m for m in model.modules() if isinstance(m, AuxiliaryTrainingWrapper)]
    found |= {tuple(module.active_adapters) for module in wrappers if not tuners}
    if len(found) != 1 or not next(iter(found)):
        raise SaveError(f"not all layers have the same active adapters ({sorted(found)}): call set_adapter first")
    return list(found.pop())


def keep_published_name(folder: Path, checkpoint: str) -> None:
    """Note in the saved config.json which checkpoint it came from, as its prompt template is looked up by that name."""
    path = folder / CONFIG
    if path.is_file():
        content = json.loads(path.read_text(encoding="utf-8"))
        write_json(path, {**content, "_name_or_path": checkpoint})


def _adapted(model: nn.Module) -> bool:
    return any(isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) for module in model.modules())


def _tuners(model: nn.Module) -> list[BaseTunerLayer]:
    """The adapted layers; a peft model's own tuner, which has no weights, is none."""
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def _scaled_as_configured(model: PeftModel, name: str) -> bool:
    """Whether every layer's scale is that of its configuration; it can be set while a program runs."""
    config = model.peft_config[name]
    if not isinstance(config, LoraConfig):
        return True
    for module in model.modules():
        if isinstance(module, LoraLayer) and name in module.scaling:
            rank = module.r[name] ** 0.5 if config.use_rslora else module.r[name]
            if abs(module.scaling[name] * rank - module.lora_alpha[name]) > 1e-6 * abs(module.lora_alpha[name]):
                return False
    return True


def _require_readable(model: nn.Module, name: str) -> None:
    """Refuse an adapter of a kind that is not read here: it would be written and not come back."""
    config = getattr(model, "peft_config", {}).get(name)
    try:
        if config is not None:
            lora_config_of({**as_saved(config), "init_lora_weights": True}, name)
    except ModelLoadError as error:
        reason = str(error).partition(": merge it")[0]
        raise SaveError(f"{reason} and could not be loaded again: {MERGE}") from error


def _as_one(model: nn.Module, names: Sequence[str], origin: Origin) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The sum of what was merged on loading and of the active adapters, as training writes it."""
    try:
        updates = [*updates_below(origin), *(update_of(model, name, name) for name in names)]
    except NotJoinableError as error:
        raise SaveError(f"{error.reason}: {MERGE}") from error
    return joined(updates, body_of(model))


def _write_adapter(
    config: LoraConfig, weights: dict[str, Tensor], wrapped: nn.Module, origin: Origin, folder: Path
) -> None:
    save_file({name: x.detach().cpu().contiguous() for name, x in weights.items()}, folder / ADAPTER_WEIGHTS)
    source = origin.decoder
    config.base_model_name_or_path = source.name if source.commit else str(source.place.absolute())
    config.revision = source.commit
    config.inference_mode = True
    config.init_lora_weights = True  # how it began is of no meaning any more
    config.auto_mapping = {"base_model_class": type(wrapped).__name__, "parent_library": type(wrapped).__module__}
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)
    config.save_pretrained(str(folder))


def _merged_by_layer(model: nn.Module) -> nn.Module:
    """For adapters that were put on by transformers' add_adapter, around which there is no peft model."""
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            _put(model, name, module.get_base_layer())
        elif isinstance(module, ModulesToSaveWrapper):
            _put(model, name, module.modules_to_save[module.active_adapters[0]])
        elif isinstance(module, AuxiliaryTrainingWrapper):
            raise SaveError(f"{name} is trained by {type(module).__name__}, which cannot be merged here")
    model._hf_peft_config_loaded = False
    model.__dict__.pop("peft_config", None)
    return model


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def written_settings(settings: dict[str, Any], model: nn.Module, checkpoint: str | None) -> dict[str, Any]:
    """What goes into llm2vec_config.json: the settings, and of the rest only what is unlike the usual."""
    found = dict(settings)
    if getattr(decoder_of(model).config, "is_causal", False):
        found[CAUSAL] = False
    if checkpoint is not None:
        found[CHECKPOINT] = checkpoint
    return found
