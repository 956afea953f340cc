"""What an adapter adds to a model's weights, taken for low-rank products only where they are all of it.

Adapters of several stages are joined by these products. Kinds of adapters are not told apart by name: every weight of
an adapter has to be in a product, merging has to add that product to each layer, and change nothing else in the model.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from functools import cache

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from llm2vec_fast.errors import UserError

from .adapter_config import is_additive
from .adapters import merged, put_on
from .body import body_prefix, plain_name, unwrapped
from .files import Source, one_line
from .lowrank import LowRank, Update

Digest = tuple[torch.Size, torch.dtype, tuple[int, ...]]
Digests = Mapping[str, Digest]  # of each parameter and buffer, by its name without adapters
_BLOCK = 2**18  # numbers compared at a time: they stay in a core's cache
_MERGE_FIRST = (
    "merge it into its base first, with LLM2Vec.from_pretrained(...).save(folder, merge_before_save=True), and go on "
    "from that folder"
)
_TRAIN_AGAIN = "train the stage that it is of again, with a plain adapter"


class NotJoinableError(UserError):
    """An adapter is more than low-rank products; ``reason`` is the message without what to do."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}: {remedy}")
        self.reason = reason


def merged_with_update(model: nn.Module, adapter: Source) -> tuple[nn.Module, Update]:
    """A model with an adapter merged into its weights, and what that added to them, by the layer's name in its body.

    Weights are compared one at a time: no second copy of the model is held.

    Raises:
        ModelLoadError: see `put_on`.
        NotJoinableError: the adapter is more than low-rank products.
    """
    before = digests(model)
    wrapped = put_on(model, adapter)
    update = update_of(wrapped, wrapped.active_adapter, adapter.name)
    require_same_base(before, wrapped, adapter.name)
    config, adapted = wrapped.active_peft_config, {f"{name}.weight" for name in _lora_layers(wrapped)}
    model = merged(wrapped)
    after = digests(model, adapted)
    fixed = before.keys() - adapted
    odd = next((name for name in sorted(fixed | after.keys()) if before.get(name) != after.get(name)), None)
    if odd is not None:
        raise _refusal(adapter.name, config, f"it changes {odd}")
    return model, update


def update_of(model: nn.Module, name: str, adapter: str) -> Update:
    """What the adapter ``name`` of a model adds to the weights, by the layer's name in the model's body.

    Args:
        model: with the adapter on it, not merged.
        adapter: what messages call it.

    Raises:
        NotJoinableError: it is more than low-rank products added to the weights of linear layers.
    """
    config = getattr(model, "peft_config", {}).get(name)  # none inside a peft model that is around an encoder
    layers = {layer: module for layer, module in _lora_layers(model).items() if name in module.lora_A}
    held = {f"{layer}.lora_{part}.weight" for layer in layers for part in "AB"}
    odd = sorted(key for key in _weights_of(name, model) if key not in held)
    parts = {}
    for layer, module in layers.items():
        try:
            after = _merged_copy(module, name)
        except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError) as error:
            what = f"it cannot be merged into {layer} ({one_line(error)})"
            raise _refusal(adapter, config, what, _TRAIN_AGAIN) from error
        parts[layer] = _product(module, name)
        if not odd and not _adds(parts[layer], module, after, name):
            raise _refusal(adapter, config, f"merging it does not add the product of lora_A and lora_B to {layer}")
    if odd or not layers:
        raise _refusal(adapter, config, f"it has {odd[0]}" if odd else "it has no lora_A and lora_B")
    prefix = body_prefix(model)
    return {layer.removeprefix(prefix): part for layer, part in parts.items()}


def digests(model: nn.Module, but: set[str] = frozenset()) -> Digests:
    """Of every parameter and buffer of a model, but those named: equal ones are of equal bytes."""
    found = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        name = _without_wrappers(name)
        if name not in but:
            found[name] = tensor
    with ThreadPoolExecutor(max(1, min(8, os.cpu_count() or 1))) as threads:
        return dict(zip(found, threads.map(_digest, found.values()), strict=True))


def require_same_base(before: Digests, wrapped: PeftModel, adapter: str) -> None:
    """Refuse an adapter that changed the weights under it where it was put on.

    Raises:
        NotJoinableError: the message names the first weight.
    """
    now = digests(wrapped.get_base_model())
    odd = next((name for name, digest in before.items() if now.get(name) != digest), None)
    if odd is not None:
        raise _refusal(adapter, wrapped.active_peft_config, f"putting it on changes {odd}")


def same_updates(one: Update, other: Update) -> bool:
    """Whether two adapters add the same products, bit for bit."""
    return one.keys() == other.keys() and all(
        torch.equal(x, y) for layer, part in one.items() for x, y in zip(part, other[layer], strict=True)
    )


def _weights_of(name: str, model: nn.Module) -> Iterator[str]:
    """The names of an adapter's weights as peft saves them; whatever it adds goes by its name."""
    for key in unwrapped(model).state_dict():
        if name in (parts := plain_name(key).split(".")):
            yield ".".join(part for part in parts if part != name)


def _lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Of one weight each: an adapter of single parameters, as experts have them, is a layer around another."""
    return {
        plain_name(name): module
        for name, module in unwrapped(model).named_modules()
        if isinstance(module, LoraLayer)
        and not isinstance(module.base_layer, BaseTunerLayer)
        and not hasattr(module, "parameter_name")
        and isinstance(getattr(module.base_layer, "weight", None), Tensor)
    }


def _product(module: LoraLayer, name: str) -> LowRank:
    up, down = module.lora_B[name].weight.detach(), module.lora_A[name].weight.detach()
    return LowRank((up.float() * module.scaling[name]).cpu(), down.float().cpu().clone())


def _merged_copy(module: LoraLayer, name: str) -> LoraLayer:
    copied = copy.deepcopy(module)
    copied.merge(adapter_names=[name])
    return copied


def _adds(part: LowRank, module: LoraLayer, merged: LoraLayer, name: str) -> bool:
    """Whether merging added the product to a layer's weight, as far as rounding lets one see that.

    With u the unit roundoff of a dtype, W' the merged weight and r the rank, rounding moves W' by no more than
    (u of the weights + 2 u of float32) |W'| + (r + 4) u of the product's arithmetic · |up| |down|, and the smallest
    subnormal number (Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 3.1). Computing the
    difference in float32 doubles all but the first; |up| |down| is bounded by norms (Cauchy and Schwarz).
    """
    before, after = (x.get_base_layer().weight.detach() for x in (module, merged))
    if getattr(module, "fan_in_fan_out", False):
        before, after = before.T, after.T
    if not before.is_floating_point() or before.shape != (part.up.shape[0], part.down.shape[1]):
        return False
    coarse = torch.bfloat16 if torch.get_float32_matmul_precision() != "highest" else torch.float32
    unit_product = max(_unit(module.lora_A[name].weight.dtype), _unit(module.lora_B[name].weight.dtype), _unit(coarse))
    unit_weight = _unit(before.dtype) + 4 * _unit(torch.float32)
    least = 2 * torch.finfo(before.dtype).tiny * torch.finfo(before.dtype).eps
    up, down = (x.to(before.device) for x in part)
    sizes = up.norm(dim=1), down.norm(dim=0) * (2 * (len(down) + 4) * unit_product)
    rows = max(1, _BLOCK // before.shape[1])
    for old, new, left, size in zip(*(x.split(rows) for x in (before, after, up, sizes[0])), strict=True):
        new = new.float()
        error = torch.addmm(new - old.float(), left, down, alpha=-1).abs_()
        bound = torch.outer(size, sizes[1]).add_(new.abs_(), alpha=unit_weight).add_(least)
        if not bool((error <= bound).all()):  # NaN is not within it
            return False
    return True


def _unit(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def _without_wrappers(name: str) -> str:
    """A weight's name as it is without adapters around it."""
    return ".".join(part for part in plain_name(name).split(".") if part not in ("base_layer", "original_module"))


def _digest(tensor: Tensor) -> Digest:
    """By multilinear hashing of 64-bit words modulo 2^64: any one changed word shows, and of several all but never not.

    Carter and Wegman, Universal classes of hash functions, 1979. Ten times as fast as a cryptographic one.
    """
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    words = nn.functional.pad(flat, (0, -len(flat) % 8)).view(torch.int64) if len(flat) % 8 else flat.view(torch.int64)
    factors = _factors()
    return tensor.shape, tensor.dtype, tuple(int(x @ factors[: len(x)]) for x in words.split(len(factors)))


@cache
def _factors() -> Tensor:
    """Odd ones: no change of a single word is multiplied to nothing."""
    return (
        torch.randint(-(2**62), 2**62, (2**16,), generator=torch.Generator("cpu").manual_seed(0), device="cpu") * 2 + 1
    )


def _refusal(adapter: str, config: PeftConfig | None, what: str, remedy: str = _MERGE_FIRST) -> NotJoinableError:
    kind = [
        f"{x.name}={getattr(config, x.name)!r}"
        for x in (fields(config) if config is not None else ())
        if not is_additive(x.name) and getattr(config, x.name) not in (x.default, None, {})
    ]
    told = f" ({', '.join(kind)})" if kind else ""
    return NotJoinableError(
        f"the adapter {adapter}{told} is not plain LoRA and cannot be joined with another, as {what}", remedy
    )
