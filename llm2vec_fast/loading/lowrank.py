"""Adapters of several stages as one: the weights that come out need nothing but the model they were all made for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from llm2vec_fast.bidirectional import decoder_of
from llm2vec_fast.errors import UserError

_PREFIX = "base_model.model."


class LowRank(NamedTuple):
    """What an adapter adds to one weight, up · down: ``up`` (out, r) holds the adapter's scale, ``down`` is (r, in)."""

    up: Tensor
    down: Tensor


Update = Mapping[str, LowRank]  # by the layer's name in the decoder


def update_of(wrapped: PeftModel, adapter: str) -> Update:
    """What the adapter of ``wrapped`` adds to the weights.

    Raises:
        UserError: it is of a kind that is not only added low-rank products.
    """
    if not is_plain(wrapped, wrapped.active_adapter):
        raise UserError(
            f"the adapter {adapter} is not plain LoRA and cannot be joined with a new one: merge it into its base "
            "first, with LLM2Vec.from_pretrained(...).save(folder, merge_before_save=True), and train from that folder"
        )
    return updates_in(decoder_of(wrapped), wrapped.active_adapter)


def is_plain(model: nn.Module, name: str) -> bool:
    """Whether an adapter only adds low-rank products to linear layers: then its weights and scales are all of it."""
    config = getattr(model, "peft_config", {}).get(name)
    if not isinstance(config, LoraConfig) or config.bias != "none":
        return False
    others = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and name in getattr(module, "_adapters", ()):
            return False
        if isinstance(module, LoraLayer) and _has(module, name):
            plain = name in module.lora_A and not isinstance(module.get_base_layer(), others)
            special = module.use_dora.get(name) or module.lora_bias.get(name) or module.lora_variant.get(name)
            if not plain or special or hasattr(module, "parameter_name"):  # of single parameters, as experts have them
                return False
    return True


def _has(module: LoraLayer, name: str) -> bool:
    return name in module.lora_A or name in module.lora_embedding_A


def updates_in(decoder: nn.Module, name: str) -> Update:
    """What the plain adapter of this name adds to each layer of a decoder."""
    return {
        _without_wrappers(layer): LowRank(
            (module.lora_B[name].weight.detach().float() * module.scaling[name]).cpu(),
            module.lora_A[name].weight.detach().float().cpu().clone(),
        )
        for layer, module in decoder.named_modules()
        if isinstance(module, LoraLayer) and name in module.lora_A
    }


def _without_wrappers(layer: str) -> str:
    return ".".join(part for part in layer.split(".") if not part.startswith("_"))


def scales_of(wrapped: PeftModel) -> dict[str, float]:
    """The factor on each layer's low-rank product, by its name in the decoder: a configuration may have several."""
    name = wrapped.active_adapter
    return {
        _without_wrappers(layer): module.scaling[name]
        for layer, module in decoder_of(wrapped).named_modules()
        if isinstance(module, LoraLayer) and name in module.scaling
    }


def update_of_weights(weights: Mapping[str, Tensor], scales: Mapping[str, float]) -> Update:
    """The same as `update_of` from an adapter's state dict, as peft names it for the decoder alone, and `scales_of`."""
    layers = {key.removeprefix(_PREFIX).rsplit(".lora_", 1)[0] for key in weights}
    return {
        layer: LowRank(
            weights[f"{_PREFIX}{layer}.lora_B.weight"].float().cpu() * scales[layer],
            weights[f"{_PREFIX}{layer}.lora_A.weight"].float().cpu(),
        )
        for layer in sorted(layers)
    }


def joined(
    updates: Sequence[Update], decoder: nn.Module, rank: int | None = None
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """One adapter that adds the sum of ``updates``.

    Args:
        updates: what each of them adds.
        decoder: what they are put on.
        rank: of what comes out, the nearest there is to the sum (by singular values, the least sum of squares apart);
            None for the sum of their ranks, which is exact.

    Returns:
        Its configuration, which names no base yet, and its weights, float32, for the decoder alone.
    """
    total = _sum(updates)
    if rank is not None:
        total = {layer: _cut(part, rank) for layer, part in total.items()}
    weights = {}
    for layer, part in total.items():
        weights[f"{_PREFIX}{layer}.lora_B.weight"] = part.up.contiguous()
        weights[f"{_PREFIX}{layer}.lora_A.weight"] = part.down.contiguous()
    rank = next(iter(total.values())).down.shape[0]
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=_targets(set(total), decoder), bias="none")
    return config, weights


def _sum(updates: Sequence[Update]) -> Update:
    """Their products side by side: every layer has the sum of their ranks."""
    ranks = [max(part.down.shape[0] for part in update.values()) for update in updates]
    total = {}
    for layer in dict.fromkeys(name for update in updates for name in update):
        known = next(update[layer] for update in updates if layer in update)
        nothing = LowRank(known.up[:, :0], known.down[:0])
        parts = [_widened(update.get(layer, nothing), rank) for update, rank in zip(updates, ranks, strict=True)]
        total[layer] = LowRank(torch.cat([x.up for x in parts], dim=1), torch.cat([x.down for x in parts], dim=0))
    return total


def _cut(part: LowRank, rank: int) -> LowRank:
    """The nearest product of at most ``rank`` columns and rows."""
    if part.down.shape[0] <= rank:
        return part
    left, up = torch.linalg.qr(part.up)
    right, down = torch.linalg.qr(part.down.T)
    outer, sizes, inner = torch.linalg.svd(up @ down.T)
    root = sizes[:rank].sqrt()
    return _widened(LowRank(left @ outer[:, :rank] * root, (root[:, None] * inner[:rank]) @ right.T), rank)


def _widened(part: LowRank, rank: int) -> LowRank:
    """The same product with ``rank`` columns and rows, the added ones zero."""
    spare = rank - part.down.shape[0]
    return LowRank(nn.functional.pad(part.up, (0, spare)), nn.functional.pad(part.down, (0, 0, 0, spare)))


def _targets(layers: set[str], decoder: nn.Module) -> list[str]:
    """The layers by their last name, where every layer so named is meant; else by their whole names."""
    short = {layer.rsplit(".", 1)[-1] for layer in layers}
    meant = {
        name.replace(".base_layer", "")
        for name, module in decoder.named_modules()
        if isinstance(module, nn.Linear) and name.replace(".base_layer", "").rsplit(".", 1)[-1] in short
    }
    return sorted(short if meant == layers else layers)
