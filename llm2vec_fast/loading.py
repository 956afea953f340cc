"""From a name or a path to a decoder with its tokenizer: folders, hub names, adapters, GGUF files; clear refusals."""

from __future__ import annotations

import importlib.util
import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.utils import cached_file, logging

from .adapters import adapter_source
from .errors import ModelLoadError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
SETTINGS_FILE = "llm2vec_config.json"
_KEY_STYLES = (
    (r"^", ""),
    (r"^base_model\.model\.model\.", "base_model.model."),
    (r"^base_model\.model\.", "base_model.model.model."),
)


@dataclass
class Loaded:
    """A decoder, its tokenizer, the name its checkpoint was published under, and the saved encoder settings."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    checkpoint: str
    settings: dict[str, Any] = field(default_factory=dict)


def best_device() -> torch.device:
    """The accelerator where there is one, else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator if accelerator is not None else torch.device("cpu")


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
        kwargs: passed on to ``AutoModel.from_pretrained``.

    Raises:
        ModelLoadError: something is missing, damaged, or stored as pickle.
    """
    base = str(base)
    _refuse_missing_path(base)
    trust = {"trust_remote_code": trust_remote_code}
    first_adapter = base if is_adapter(base) else None
    source = base_of(base) if first_adapter else base
    model = _load_base(source, AutoModelForCausalLM if head else AutoModel, dtype=dtype, **trust, **kwargs)
    tokenizer = _load_tokenizer(base, source, **trust)
    if first_adapter:
        model = merged(put_on(model, first_adapter))
    if adapter is not None:
        adapter = adapter_source(adapter)
        model = put_on(model, adapter)
        model = merged(model) if merge else model
    settings = _read_json(adapter if adapter is not None else base, SETTINGS_FILE) or {}
    return Loaded(model, tokenizer, _published_name(base, source), settings)


def merged(wrapped: PeftModel) -> nn.Module:
    """The model alone, its adapter merged into its weights."""
    model = wrapped.merge_and_unload()
    model.__dict__.pop("peft_config", None)  # older releases of peft leave it, and take it for an adapter in place
    return model


def _load_base(source: str, kind: type, **kwargs: Any) -> PreTrainedModel:
    where = _gguf_arguments(source) if _is_gguf(source) else {"pretrained_model_name_or_path": source}
    if not _is_gguf(source):
        _refuse_unusable_folder(source)
        where["use_safetensors"] = True
    try:
        with _quiet():
            model, found = kind.from_pretrained(**where, output_loading_info=True, **kwargs)
    except Exception as error:  # the readers of damaged files raise anything
        raise ModelLoadError(f"the model {source} cannot be loaded: {_one_line(error)}") from error
    if found["missing_keys"]:
        names = sorted(found["missing_keys"])
        raise ModelLoadError(
            f"the model {source} has no weights for {len(names)} of its parameters ({names[0]}, …): the folder is "
            "incomplete, or its configuration belongs to another model"
        )
    return model


def _load_tokenizer(*sources: str, **kwargs: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of the first source that has one: an adapter often comes without."""
    for source in sources:
        where = _gguf_arguments(source) if _is_gguf(source) else {"pretrained_model_name_or_path": source}
        where.pop("quantization_config", None)
        try:
            return AutoTokenizer.from_pretrained(**where, **kwargs)
        except Exception as error:  # the readers of damaged files raise anything
            problem = error
    raise ModelLoadError(f"the tokenizer of {sources[-1]} cannot be loaded: {_one_line(problem)}") from problem


def _is_gguf(source: str) -> bool:
    return source.lower().endswith(".gguf")


def _gguf_arguments(source: str) -> dict[str, Any]:
    path = Path(source)
    if importlib.util.find_spec("gguf") is None:
        raise ModelLoadError("reading a GGUF file needs the package gguf: pip install 'llm2vec-fast[gguf]'")
    arguments: dict[str, Any] = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    # Releases that have GgufConfig keep quantised weights unless told otherwise, and cannot save those.
    config = getattr(transformers, "GgufConfig", None)
    if config is not None:
        arguments["quantization_config"] = config(dequantize=True)
    return arguments


def _refuse_missing_path(source: str) -> None:
    """What can only be a path is not looked for on a hub."""
    looks_like_a_path = Path(source).is_absolute() or source.startswith((".", "~")) or _is_gguf(source)
    if looks_like_a_path and not Path(source).exists():
        kind = "GGUF file" if _is_gguf(source) else "model folder"
        raise ModelLoadError(f"the {kind} {source} does not exist: check the path")


def _refuse_unusable_folder(source: str) -> None:
    folder = Path(source)
    if not folder.is_dir():
        return
    if not (folder / "config.json").is_file():
        raise ModelLoadError(f"the model folder {source} has no config.json: it is not a transformers model")
    if not any(folder.glob("*.safetensors")):
        pickles = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
        if pickles:
            raise ModelLoadError(
                f"the model folder {source} has its weights only as pickle ({pickles[0].name}), which can run any code "
                "when read: convert it where you trust it, with AutoModel.from_pretrained(...).save_pretrained(...)"
            )
        raise ModelLoadError(f"the model folder {source} has no weights: a *.safetensors file is expected")


def is_adapter(source: str) -> bool:
    """Whether a folder or hub name holds an adapter."""
    return not _is_gguf(source) and _find(source, ADAPTER_CONFIG) is not None


def base_of(adapter: str) -> str:
    """The model that an adapter's configuration names as its base.

    Raises:
        ModelLoadError: it names none.
    """
    named = (_read_json(adapter, ADAPTER_CONFIG) or {}).get("base_model_name_or_path")
    if not named:
        raise ModelLoadError(
            f"{adapter}/{ADAPTER_CONFIG} names no base_model_name_or_path: pass the base, and this as the adapter"
        )
    return str(named)


def put_on(model: nn.Module, adapter: str) -> PeftModel:
    """Wrap a decoder in the adapter, frozen; every weight of the adapter must find its place.

    Raises:
        ModelLoadError: the adapter cannot be read, or was made for a model of another family or shape.
    """
    config = _adapter_config(adapter, model)
    weights = _adapter_weights(adapter)
    try:
        with _quiet():
            wrapped = get_peft_model(model, config)
        names = set(wrapped.state_dict())
        # Adapters of a model with its head say model.model.layers where those of the decoder alone have model.layers.
        styles = [{re.sub(old, new, key): key for key in weights} for old, new in _KEY_STYLES]
        best = max(styles, key=lambda style: _fitting(style, names))
        renamed = {new: weights[old] for new, old in best.items() if ".lm_head." not in new}
        result = set_peft_model_state_dict(wrapped, renamed)
    except (ValueError, RuntimeError) as error:  # layers of other names, weights of another shape
        raise ModelLoadError(f"the adapter {adapter} does not fit this base: {_one_line(error)}") from error
    lost = sorted(result.unexpected_keys) or sorted(key for key in result.missing_keys if "lora_" in key)
    if lost:
        raise ModelLoadError(
            f"the adapter {adapter} does not fit this base: {lost[0]} and {len(lost) - 1} others have no counterpart"
        )
    return wrapped.eval()


def _fitting(keys: Any, names: set[str]) -> int:
    """How many of an adapter's keys name a parameter; in the model they carry the adapter's name as well."""
    bare = {name.replace(".default.", ".") for name in names}
    return sum(key in bare for key in keys)


def _adapter_config(adapter: str, model: nn.Module) -> PeftConfig:
    if not is_adapter(adapter):
        raise ModelLoadError(f"the adapter {adapter} has no {ADAPTER_CONFIG}: pass the folder that holds it")
    try:
        config = PeftConfig.from_pretrained(adapter)
    except Exception as error:
        raise ModelLoadError(f"the adapter {adapter} cannot be read: {_one_line(error)}") from error
    made_for = (config.auto_mapping or {}).get("base_model_class", "")
    if not _of_one_family(made_for, model.config.model_type):
        raise ModelLoadError(
            f"the adapter {adapter} was made for a {made_for} and this base is a {type(model).__name__}: pass the base "
            f"it was made for, {config.base_model_name_or_path}"
        )
    config.inference_mode = True
    config.base_model_name_or_path = model.name_or_path  # which may have moved since
    if isinstance(config, LoraConfig):
        config.task_type = None  # the decoder alone has none; tasks wrap it for generation
    return config


def _of_one_family(class_name: str, model_type: str) -> bool:
    """Whether a class such as MistralBiModel may be one of ``model_type``; one that no family's name begins may be any.

    Layers of two families can have the same names and shapes, so that neither tells an adapter's base.
    """
    families = [kind.replace("_", "").replace("-", "") for kind in CONFIG_MAPPING_NAMES]
    own, name = model_type.replace("_", "").replace("-", ""), class_name.lower()
    family = max((kind for kind in families if name.startswith(kind)), key=len, default=own)
    return family.startswith(own) or own.startswith(family)


def _adapter_weights(adapter: str) -> dict[str, torch.Tensor]:
    path = _find(adapter, ADAPTER_WEIGHTS)
    if path is None:
        if _find(adapter, "adapter_model.bin") is not None:
            raise ModelLoadError(
                f"the adapter {adapter} has its weights only as pickle (adapter_model.bin), which can run any code "
                "when read: convert it where you trust it, with peft's save_pretrained(..., safe_serialization=True)"
            )
        raise ModelLoadError(f"the adapter {adapter} has no {ADAPTER_WEIGHTS}")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelLoadError(f"the adapter's file {path} is damaged: {_one_line(error)}") from error


def _published_name(base: str, source: str) -> str:
    """The name in the saved configuration, which a local copy of a checkpoint keeps; else the one it was loaded by."""
    for place in (base, source):
        name = (_read_json(place, "config.json") or {}).get("_name_or_path") if Path(place).is_dir() else None
        if name:
            return str(name)
    return source


def _find(source: str, name: str) -> str | None:
    """A file of a folder or of a hub repository; None where it has no such file."""
    if Path(source).is_dir():
        path = Path(source, name)
        return str(path) if path.is_file() else None
    if Path(source).exists():
        return None
    try:
        return cached_file(
            source,
            name,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except OSError as error:
        raise ModelLoadError(f"{source} is neither a folder here nor the name of a model on the hub") from error


def _read_json(source: str, name: str) -> dict[str, Any] | None:
    path = None if _is_gguf(source) else _find(source, name)
    if path is None:
        return None
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path} is not valid JSON: {_one_line(error)}") from error
    if not isinstance(content, dict):
        raise ModelLoadError(f"{path} holds a {type(content).__name__}, not a JSON object")
    return content


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars, and no report that the output layer of a checkpoint goes unused: it always does here."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
