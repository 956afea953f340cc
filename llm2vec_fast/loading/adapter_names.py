"""An adapter's names, of the model it was made for, as those of the model it is put on.

Adapters are made for a decoder alone (``layers.0.…``), under a head (``model.layers.0.…``) or inside a larger model,
and both their weights and their configuration name layers in that way. Which it was shows in the weights; what the
configuration then means is asked of peft itself, with the names that it was written for.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.other import get_pattern_key
from torch import nn
from transformers.pytorch_utils import Conv1D

from llm2vec_fast.bidirectional import decoder_of
from llm2vec_fast.errors import ModelLoadError

from .body import plain_name

PREFIX = "base_model.model."
_HEADS = ("lm_head", "embed_out", "score", "classifier", "output_layer")
_PARTS = re.compile(r"\.(lora_|modules_to_save\.|token_adapter\.|trainable_tokens_|base_layer\.|bias$|weight$)")

Names = Callable[[str], str | None]  # a module's name in the model here → its name in the adapter's
Plan = dict[str, tuple[int, float]]  # rank and alpha of each layer that an adapter changes, by its name here


def fitted(
    config: LoraConfig, weights: Iterable[str], model: nn.Module, adapter: str
) -> tuple[LoraConfig, dict[str, str]]:
    """What an adapter's configuration and weights are called for ``model``.

    Args:
        config: as it was saved.
        weights: the names of its weights, as peft saves them.
        model: what it is put on, bare or with a head.
        adapter: its name, for messages.

    Returns:
        The configuration that does to ``model`` what ``config`` does to the model it was made for, and the names of the
        weights here by those there; a head's are left out where ``model`` has none.

    Raises:
        ModelLoadError: weights and configuration do not agree with each other, or not with the model.
    """
    keys = [key.removeprefix(PREFIX) for key in weights]
    here = _prefix_here(model)
    there = _prefix_there(keys, decoder_of(model), adapter)
    renamed = {PREFIX + key: PREFIX + new for key in keys if (new := _renamed(key, there, here, model, adapter))}
    modules = {name for name, _ in model.named_modules()}
    lost = sorted(old for old, new in renamed.items() if _layer(new.removeprefix(PREFIX)) not in modules)
    if lost:
        raise ModelLoadError(
            f"the adapter {adapter} does not fit this base: {lost[0]} and {len(lost) - 1} others have no counterpart"
        )
    adapted = {_layer(new.removeprefix(PREFIX)) for new in renamed.values() if ".lora_" in new}
    for style in dict.fromkeys((there, "model." + there, there.removeprefix("model."), here)):
        wanted = _plan(config, model, _names(style, here))
        if set(wanted) == adapted or config.target_parameters:
            _refuse_lost_patterns(config, wanted, _names(style, here), here, adapter)
            return _expressed(config, wanted, model, _names(style, here), adapter), renamed
    wanted = _plan(config, model, _names(there, here))
    odd = sorted(adapted.symmetric_difference(wanted)) or ["none"]
    raise ModelLoadError(
        f"the adapter {adapter} does not fit this base: {odd[0]} and {len(odd) - 1} other layers are in its weights "
        "or in its configuration alone"
    )


def named_for_body(config: LoraConfig, plan: Plan, body: nn.Module, model: str) -> LoraConfig:
    """A configuration that does to a bare body what the adapter on it does, however ``config`` names its layers.

    Args:
        config: of the adapter, as peft put it on.
        plan: rank and alpha of each layer that it has, by the layer's name in the body; a head's by its own.
        body: with the adapter on it.
        model: its name, for messages.
    """
    of_body = {plain_name(name) for name, _ in body.named_modules()}
    wanted = {name: x for name, x in plan.items() if name in of_body}
    if _plan_under_adapter(config, body) == wanted:
        return replace(config)
    explicit = _explicit(config, plan)
    if _plan_under_adapter(explicit, body) != wanted:
        raise ModelLoadError(f"the adapter cannot be written for {model} alone: its layers' names clash")
    return explicit


def _plan_under_adapter(config: LoraConfig, body: nn.Module) -> Plan:
    def bare(name: str) -> str | None:
        parts = plain_name(name).split(".")
        own = any(part.startswith("lora_") for part in parts)
        return None if own else ".".join(part for part in parts if part != "base_layer")

    return {bare(name): x for name, x in _plan(config, body, bare).items()}


def _prefix_here(model: nn.Module) -> str:
    decoder = decoder_of(model)
    return next(f"{name}." if name else "" for name, module in model.named_modules() if module is decoder)


def _prefix_there(keys: Iterable[str], decoder: nn.Module, adapter: str) -> str:
    """What stands before the decoder's own names in those of an adapter's weights."""
    children = {name for name, _ in decoder.named_children()}
    found: Counter[str] = Counter()
    lost = None
    for key in keys:
        parts = key.split(".")
        first = next((i for i, part in enumerate(parts) if part in children), None)
        if first is not None:
            found["".join(f"{part}." for part in parts[:first])] += 1
        elif parts[0] not in _HEADS:
            lost = key
    if not found:
        raise ModelLoadError(
            f"the adapter {adapter} does not fit this base: "
            f"{lost or 'what it changes'} and {max(0, len(list(keys)) - 1)} others have no counterpart"
        )
    return found.most_common(1)[0][0]


def _renamed(key: str, there: str, here: str, model: nn.Module, adapter: str) -> str | None:
    """A weight's name here; None for a head's where there is none."""
    head = key.removeprefix("model.").split(".")[0]
    if head in _HEADS and not hasattr(decoder_of(model), head):
        return key if hasattr(model, head) else None
    if key.startswith(there):
        return here + key.removeprefix(there)
    outer = there.removesuffix(here) if there.endswith(here) else None
    if outer is not None and key.startswith(outer):
        return key.removeprefix(outer)
    raise ModelLoadError(f"the adapter {adapter} does not fit this base: {key} and others have no counterpart")


def _names(there: str, here: str) -> Names:
    def name_there(name: str) -> str | None:
        if name.startswith(here):
            return there + name.removeprefix(here)
        return there.removesuffix(here) + name if there.endswith(here) else name

    return name_there


def _layer(key: str) -> str:
    return _PARTS.split(key, maxsplit=1)[0]


def _plan(config: LoraConfig, model: nn.Module, names: Names) -> Plan:
    """What peft would change, and how much, if the modules were called what ``names`` says."""
    plan: Plan = {}
    for name, module in model.named_modules():
        called = names(name)
        if called is None or not _adaptable(module) or not _targeted(config, called, module, model):
            continue
        rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), called), config.r)
        alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), called), config.lora_alpha)
        plan[name] = (rank, alpha)
    return plan


def _adaptable(module: nn.Module) -> bool:
    return next(module.children(), None) is None and getattr(module, "weight", None) is not None


def _targeted(config: LoraConfig, called: str, module: nn.Module, model: nn.Module) -> bool:
    targets = config.target_modules
    if isinstance(targets, str) and targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        wanted = isinstance(module, (nn.Linear, Conv1D)) and module is not head
        every = replace(config, target_modules=[called])
        return wanted and bool(check_target_module_exists(every, called))
    if targets is None:
        return False
    return bool(check_target_module_exists(config, called))


def _refuse_lost_patterns(config: LoraConfig, plan: Plan, names: Names, here: str, adapter: str) -> None:
    """A pattern that meets no layer is of no effect in peft; one that names layers in another way was meant to be."""
    called = [names(name) or "" for name in plan]
    in_decoder = [name.removeprefix(here) for name in plan]
    for field in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, field):
            if any(get_pattern_key([key], name) == key for name in called):
                continue
            tails = [key.split(".", cut)[-1] for cut in range(1, key.count(".") + 1)]
            if any(_matches(tail, name) for tail in tails for name in in_decoder):
                raise ModelLoadError(
                    f"the adapter {adapter} has a {field} for {key}, but names its weights {called[0]}, …: which "
                    "layers it is for cannot be told; save it again with one kind of names"
                )


def _matches(tail: str, name: str) -> bool:
    try:
        return re.fullmatch(tail, name) is not None
    except re.error:  # cut within an expression, such as the ".*\\.experts" that peft writes itself
        return False


def _expressed(config: LoraConfig, wanted: Plan, model: nn.Module, names: Names, adapter: str) -> LoraConfig:
    """A configuration that peft understands in this way on the model as it is: the same one wherever it will do."""
    saved = _saved_modules(config, model, names, adapter)
    tokens = _token_layers(config, model, names)
    config = replace(config, modules_to_save=saved, trainable_token_indices=tokens)
    if _plan(config, model, lambda name: name) == wanted:
        return config
    explicit = _explicit(config, wanted)
    if _plan(explicit, model, lambda name: name) != wanted:
        raise ModelLoadError(f"the adapter {adapter} cannot be put on {type(model).__name__}: its layers' names clash")
    return explicit


def _explicit(config: LoraConfig, plan: Plan) -> LoraConfig:
    """With every layer by its whole name."""
    return replace(
        config,
        target_modules=sorted(plan),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        rank_pattern={name: rank for name, (rank, _) in plan.items() if rank != config.r},
        alpha_pattern={name: alpha for name, (_, alpha) in plan.items() if alpha != config.lora_alpha},
    )


def _saved_modules(config: LoraConfig, model: nn.Module, names: Names, adapter: str) -> list[str] | None:
    """Modules that the adapter replaces whole. peft takes every module whose name ends with one of these."""
    asked = config.modules_to_save
    if not asked:
        return None
    every = [name for name, _ in model.named_modules() if name]
    wanted = {name for name in every if (names(name) or "").endswith(tuple(asked))}
    if not wanted:
        return None  # of a head that is not here
    for offered in (asked, sorted(wanted)):
        if {name for name in every if name.endswith(tuple(offered))} == wanted:
            return list(offered)
    raise ModelLoadError(
        f"the adapter {adapter} has modules_to_save={asked}, which cannot be said of {type(model).__name__}, where "
        "other modules end in these names: merge it with peft's merge_and_unload() and pass the model that comes out"
    )


def _token_layers(config: LoraConfig, model: nn.Module, names: Names) -> Mapping[str, list[int]] | list[int] | None:
    asked = config.trainable_token_indices
    if not isinstance(asked, dict):
        return asked
    found = {}
    for key, tokens in asked.items():
        for name, module in model.named_modules():
            if isinstance(module, nn.Embedding) and (names(name) or "").endswith(key):
                found[name] = tokens
    return found or None
