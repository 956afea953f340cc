"""The model that a stage trains: a decoder that attends both ways, with what earlier stages learned, and an adapter."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn
from transformers import PreTrainedTokenizerBase, set_seed

from llm2vec_fast.acceleration import accelerate
from llm2vec_fast.adapters import adapter_source
from llm2vec_fast.bidirectional import decoder_of, make_bidirectional
from llm2vec_fast.errors import UserError
from llm2vec_fast.loading import (
    HubOptions,
    adapter_weights,
    best_device,
    load_stack,
    locate,
    merged,
    origin_of,
    put_on,
    remember,
    require_below,
    resolve,
)
from llm2vec_fast.loading.files import Source
from llm2vec_fast.loading.joinable import digests, merged_with_update, require_same_base, same_updates, update_of
from llm2vec_fast.loading.lowrank import Update
from llm2vec_fast.loading.stack import Stack
from llm2vec_fast.precision import choose_dtype
from llm2vec_fast.training.arguments import LORA_TARGETS, StageArguments
from llm2vec_fast.training.embedding import TRAINING
from llm2vec_fast.training.neftune import add_noise
from llm2vec_fast.training.written import name_base, require_loadable

logger = logging.getLogger(__name__)


@dataclass
class StageModel:
    """What is trained.

    Attributes:
        model: a transformers model, inside a peft model unless all weights are trained.
        tokenizer: the decoder's.
        checkpoint: the name the decoder was published under.
        merged: what the adapters of earlier stages added to the weights, in order.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    checkpoint: str
    merged: list[Update] = field(default_factory=list)


def load_model(arguments: StageArguments, *, head: bool) -> StageModel:
    """The decoder of a stage, attending both ways, its weights frozen under an adapter, on the fused operations.

    Args:
        arguments: which model, which adapters, and what the new one is like.
        head: with the output layer.

    Raises:
        ModelLoadError: the model or an adapter is missing, damaged, or made for another base.
        UserError: an adapter is of a kind that cannot be joined with a new one, the model has no layer to adapt, or
            what is trained could not be loaded afterwards.
    """
    set_seed(arguments.seed)  # the adapter's first weights are random
    dtype = choose_dtype(arguments.model_dtype, best_device() if not arguments.use_cpu else torch.device("cpu")).dtype
    if arguments.fsdp and arguments.world_size == 1:
        raise UserError("fsdp needs several processes: start with torchrun --nproc-per-node N, or leave it out")
    stack, adapters = _resolved(arguments)
    # 16-bit weights are too coarse to be trained themselves.
    loaded = load_stack(stack, merge=True, dtype=dtype if arguments.lora_r else torch.float32, head=head)
    model, updates = loaded.model, []
    continued = adapters.pop() if arguments.continue_adapter else None
    for adapter in adapters:
        if arguments.lora_r:
            model, update = merged_with_update(model, adapter)
            updates.append(update)
        else:
            model = merged(put_on(model, adapter))
    remember(model, replace(origin_of(model), merged=tuple(adapters)))
    model = make_bidirectional(model.requires_grad_(True))  # an adapter froze what it was merged into
    if continued is not None:
        model = _trained_on(model, continued, arguments.lora_dropout)
    elif arguments.lora_r:
        model = _adapted(model, arguments)
    if arguments.lora_r and arguments.gradient_checkpointing:
        model.enable_input_require_grads()
    require_loadable(model, updates, arguments.saved_rank)
    if arguments.lora_r:
        name_base(model.active_peft_config, model)  # of checkpoints, which peft writes
    accelerate(model, owner=TRAINING)
    if arguments.neftune_noise_alpha is not None:
        add_noise(model, arguments.neftune_noise_alpha)
    return StageModel(model, loaded.tokenizer, loaded.checkpoint, updates)


def _adapted(model: nn.Module, arguments: StageArguments) -> PeftModel:
    targets = _targets(model, arguments.lora_target_modules)
    try:
        with _peft_quiet():
            adapted = get_peft_model(model, lora_config(arguments, targets))
    except ValueError as error:  # peft names the layers that it cannot adapt
        raise UserError(
            f"lora_target_modules={' '.join(arguments.lora_target_modules)} does not fit {type(model).__name__}: "
            f"{' '.join(str(error).split())}"
        ) from error
    _tell_of_layers_left(adapted, targets)
    return adapted


def _tell_of_layers_left(adapted: PeftModel, targets: list[str] | str) -> None:
    """Where experts are of one weight, peft adapts that instead of what is named, and leaves layers without experts."""
    names = [] if isinstance(targets, str) else [f".{target}" for target in targets]
    left = [
        name
        for name, module in adapted.get_base_model().named_modules()
        if isinstance(module, nn.Linear) and f".{name}".endswith(tuple(names))
    ]
    if left:
        parameters = ", ".join(sorted(adapted.active_peft_config.target_parameters or ()))
        logger.warning(
            f"peft adapts {parameters} of the experts instead, and leaves {left[0]} and {len(left) - 1} other linear "
            "layers as they are"
        )


def _targets(model: nn.Module, names: list[str]) -> list[str] | str:
    """What peft adapts: the layers of these names, every one of which must be there, or all of the decoder where the
    default names are not, as in families that fuse projections.

    Raises:
        UserError: a name that the user gave is that of no layer.
    """
    if names == [INCLUDE_LINEAR_LAYERS_SHORTHAND]:
        return INCLUDE_LINEAR_LAYERS_SHORTHAND  # in a list it would be a layer's name
    layers = [f".{name}" for name, _ in model.named_modules()]
    missing = [name for name in names if not any(layer.endswith(f".{name}") for layer in layers)]
    if not missing:
        return names
    linear = {name.rsplit(".", 1)[-1] for name, x in decoder_of(model).named_modules() if isinstance(x, nn.Linear)}
    there = ", ".join(sorted(linear))
    if names != list(LORA_TARGETS) or not linear:
        raise UserError(
            f"lora_target_modules={' '.join(names)} does not fit {type(model).__name__}: it has no layer {missing[0]}, "
            f"but {there or 'no linear ones'}"
        )
    logger.warning(
        f"{type(model).__name__} has no layer {', '.join(missing)}: training adapts {there}, its linear layers; "
        "lora_target_modules names others"
    )
    return sorted(linear)


def lora_config(arguments: StageArguments, targets: list[str] | str) -> LoraConfig:
    """The adapter of a stage; peft keeps its weights in float32 on a 16-bit base."""
    return LoraConfig(
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha or 2 * arguments.lora_r,
        lora_dropout=arguments.lora_dropout,
        target_modules=targets,
        bias="none",
    )


def _resolved(arguments: StageArguments) -> tuple[Stack, list[Source]]:
    """The decoder alone, and all adapters to put on it in order: those that stand below it where it is one itself."""
    names = [adapter_source(adapter) for adapter in arguments.peft_model_name_or_path]
    for name in names:
        if not Path(name).expanduser().exists() and name.count("/") != 1:  # nor a name of the hub
            raise UserError(
                f"peft_model_name_or_path={name} does not exist: train the stage before this one, or give the place "
                'of its adapter, or "" for none'
            )
    stack = resolve(str(arguments.model_name_or_path), hub=HubOptions(revision=arguments.model_revision))
    adapters = [*stack.merged, *(locate(name) for name in names)]
    for place, adapter in enumerate(adapters):
        require_below(adapter, adapters[:place])
    return replace(stack, merged=()), adapters


def _trained_on(model: nn.Module, adapter: Source, dropout: float) -> PeftModel:
    """The model under an adapter of its own, as far as that was trained."""
    before = digests(model)
    frozen = put_on(model, adapter)
    update = update_of(frozen, frozen.active_adapter, adapter.name)
    config, weights = frozen.active_peft_config, adapter_weights(frozen)
    bare = frozen.unload()
    bare.__dict__.pop("peft_config", None)
    config.inference_mode, config.lora_dropout = False, dropout
    with _peft_quiet():
        trained = get_peft_model(bare, config)
    set_peft_model_state_dict(trained, weights)
    require_same_base(before, trained, adapter.name)
    if not same_updates(update, update_of(trained, trained.active_adapter, adapter.name)):
        raise UserError(f"the adapter {adapter.name} cannot be trained on as it is: merge it into its base first")
    return trained


@contextmanager
def _peft_quiet() -> Iterator[None]:
    """peft asks models for a name that transformers 5.24 warns of; nobody here could do anything about it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield
