"""Adapters of several stages as one: the weights that come out need nothing but the model they were all made for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from peft import LoraConfig
from torch import Tensor, nn

_PREFIX = "base_model.model."


class LowRank(NamedTuple):
    """What an adapter adds to one weight, up · down: ``up`` (out, r) holds the adapter's scale, ``down`` is (r, in)."""

    up: Tensor
    down: Tensor


Update = Mapping[str, LowRank]  # by the layer's name in the model's body


def update_of_weights(weights: Mapping[str, Tensor], scales: Mapping[str, float]) -> Update:
    """What an adapter adds, from its state dict, as peft names it for the body alone.

    Args:
        weights: lora_A and lora_B of every layer, nothing else.
        scales: the factor on each layer's product; a configuration may have several.
    """
    layers = {key.removeprefix(_PREFIX).rsplit(".lora_", 1)[0] for key in weights}
    return {
        layer: LowRank(
            weights[f"{_PREFIX}{layer}.lora_B.weight"].float().cpu() * scales[layer],
            weights[f"{_PREFIX}{layer}.lora_A.weight"].float().cpu(),
        )
        for layer in sorted(layers)
    }


def joined(updates: Sequence[Update], body: nn.Module, rank: int | None = None) -> tuple[LoraConfig, dict[str, Tensor]]:
    """One adapter that adds the sum of ``updates``.

    Args:
        updates: what each of them adds.
        body: what they are put on, adapters and all.
        rank: of what comes out, the nearest there is to the sum (by singular values, the least sum of squares apart);
            None for the sum of their ranks, which is exact.

    Returns:
        Its configuration, which names no base yet, and its weights, float32, for the body alone.
    """
    total = _sum(updates)
    if rank is not None:
        total = {layer: _cut(part, rank) for layer, part in total.items()}
    weights = {}
    for layer, part in total.items():
        weights[f"{_PREFIX}{layer}.lora_B.weight"] = part.up.contiguous()
        weights[f"{_PREFIX}{layer}.lora_A.weight"] = part.down.contiguous()
    rank = next(iter(total.values())).down.shape[0]
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=_targets(set(total), body), bias="none")
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


def _targets(layers: set[str], body: nn.Module) -> list[str]:
    """The layers by their last name, where every layer so named is meant; else by their whole names."""
    short = {layer.rsplit(".", 1)[-1] for layer in layers}
    meant = {
        name.replace(".base_layer", "")
        for name, module in body.named_modules()
        if isinstance(module, nn.Linear) and name.replace(".base_layer", "").rsplit(".", 1)[-1] in short
    }
    return sorted(short if meant == layers else layers)
