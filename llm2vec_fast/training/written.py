"""What a stage is going to write, known before it trains: an adapter or a model that loads to what was trained."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import MODEL_MAPPING, PreTrainedModel

from llm2vec_fast.acceleration.swapping import stock_class
from llm2vec_fast.bidirectional import decoder_of
from llm2vec_fast.errors import UserError
from llm2vec_fast.loading import adapter_weights, origin_of, wrapped_in
from llm2vec_fast.loading.adapter_config import as_saved
from llm2vec_fast.loading.adapter_names import PREFIX, named_for_body
from llm2vec_fast.loading.body import body_of, body_prefix, plain_name
from llm2vec_fast.loading.lowrank import Update, joined, update_of_weights
from llm2vec_fast.loading.quiet import quiet
from llm2vec_fast.training.embedding import LOG_SCALE


def adapter_of(
    model: PeftModel, merged: Sequence[Update], rank: int | None = None, weights: Mapping[str, Tensor] | None = None
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The adapter that holds all that the stages learned, for the model that ``AutoModel`` loads from the base.

    Args:
        model: what is trained.
        merged: what adapters of earlier stages added to the weights under it.
        rank: see `joined`.
        weights: the state dict of ``model`` where its own is not whole, as in a sharded one.
    """
    name, body, prefix = model.active_adapter, body_of(model), body_prefix(model)
    adapter = {
        PREFIX + key.removeprefix(PREFIX).removeprefix(prefix): x.cpu()
        for key, x in adapter_weights(model, weights=weights).items()
    }
    layers = {
        plain_name(key).removeprefix(prefix): module
        for key, module in model.get_base_model().named_modules()
        if isinstance(module, LoraLayer) and name in module.lora_A
    }
    experts = next((layer for layer, module in layers.items() if hasattr(module, "parameter_name")), None)
    if merged or rank is not None:
        if experts is not None:
            raise UserError(
                f"the adapter on the parameters of {experts} cannot be joined with another, nor cut to saved_rank: "
                "name linear layers in lora_target_modules, or merge the earlier adapters into a base and train on that"
            )
        scales = {layer: module.scaling[name] for layer, module in layers.items()}
        config, adapter = joined([*merged, update_of_weights(adapter, scales)], body, rank)
    else:
        linear = {layer: x for layer, x in layers.items() if not hasattr(x, "parameter_name")}
        plan = {layer: (x.r[name], x.lora_alpha[name]) for layer, x in linear.items()}
        config = named_for_body(model.active_peft_config, plan, body, type(body).__name__)
    name_base(config, model)
    config.inference_mode = True
    config.auto_mapping = {"base_model_class": type(body).__name__, "parent_library": type(body).__module__}
    return config, adapter


def name_base(config: LoraConfig, model: nn.Module) -> None:
    """A folder by its whole path: what is written may be read from anywhere."""
    origin = origin_of(model)
    if origin is not None:
        base = origin.decoder
        config.base_model_name_or_path = base.name if base.commit else str(base.place.absolute())
        config.revision = base.commit


def whole_model(model: nn.Module, weights: Mapping[str, Tensor]) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """The decoder, or the model it is in where it cannot be loaded alone, and its weights out of those of ``model``."""
    target = _loadable(model)
    prefix = next(f"{name}." if name else "" for name, module in model.named_modules() if module is target)
    names = {name.removeprefix(prefix): x for name, x in weights.items() if name.startswith(prefix)}
    return target, {name: x for name, x in names.items() if name.rpartition(".")[2] != LOG_SCALE}


def require_loadable(model: nn.Module, merged: Sequence[Update], rank: int | None = None) -> None:
    """Refuse to train what could not be loaded afterwards: it is put together as it will be, without weights.

    Raises:
        UserError: the message names the class of the model, or what has no place in it.
    """
    whole = not isinstance(model, PeftModel)
    body = _loadable(model) if whole else body_of(model)
    kinds = _loaded_as(body)
    if not kinds or (whole and stock_class(body) not in kinds):
        raise UserError(
            f"what is trained of a {type(body).__name__} could not be loaded afterwards, as AutoModel makes "
            f"{kinds[0].__name__ if kinds else 'nothing'} of {body.config.model_type}: pass another model"
        )
    if whole:
        return
    settings = copy.deepcopy(body.config)
    settings._attn_implementation = "eager"
    config, weights = adapter_of(model, merged, rank)
    with quiet(), torch.random.fork_rng(devices=[]):  # training draws what it would have drawn
        with torch.device("meta"):
            bare = kinds[0](settings)
        wrapped_in(bare, as_saved(config), {key: x.to("meta") for key, x in weights.items()}, "to be trained")


def _loadable(model: nn.Module) -> PreTrainedModel:
    decoder = decoder_of(model)
    return decoder if stock_class(decoder) in _loaded_as(decoder) else body_of(model)


def _loaded_as(model: PreTrainedModel) -> tuple[type[PreTrainedModel], ...]:
    """The classes that ``AutoModel`` has for a model's configuration."""
    known = MODEL_MAPPING.get(type(model.config), ())
    return known if isinstance(known, tuple) else (known,)
