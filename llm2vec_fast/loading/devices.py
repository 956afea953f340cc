"""Which device a model goes to, and what a device_map may say."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from llm2vec_fast.errors import ModelLoadError, UserError

PLACEMENTS = ("auto", "balanced", "balanced_low_0", "sequential")


def best_device() -> torch.device:
    """The accelerator where there is one, else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator if accelerator is not None else torch.device("cpu")


def device_of(name: Any) -> torch.device:
    """The device of a name, a number or itself.

    Raises:
        UserError: there is no such kind of device.
    """
    try:
        return torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise UserError(f"{name!r} is no device: give cpu, cuda, cuda:1 or the like") from error


def one_device(device_map: Any) -> torch.device | None:
    """The device that a device_map puts everything on; None where it spreads the model.

    Raises:
        UserError: it is neither a device nor a known way to spread a model.
    """
    if isinstance(device_map, dict):
        return device_of(device_map[""]) if set(device_map) == {""} and device_map[""] != "disk" else None
    if isinstance(device_map, str) and device_map in PLACEMENTS:
        return None
    if isinstance(device_map, (str, int, torch.device)):
        try:
            return torch.device(device_map)
        except RuntimeError as error:
            raise UserError(
                f"device_map={device_map!r} is neither a device nor one of {', '.join(PLACEMENTS)}: give one of these, "
                "or a dictionary of modules"
            ) from error
    raise UserError(f"device_map={device_map!r} is neither a device, a name nor a dictionary of modules")


def placement(device: Any, device_map: Any) -> tuple[torch.device, dict[str, Any]]:
    """The one device that a model goes to, by default the best; and what spreads it over several, if that is asked for.

    Raises:
        UserError: see `device_of` and `one_device`.
    """
    single = None if device_map is None else one_device(device_map)
    chosen = single if single is not None else device
    spread = {} if device_map is None or single is not None else {"device_map": device_map}
    return best_device() if chosen is None else device_of(chosen), spread


def refuse_weights_elsewhere(model: nn.Module, source: str) -> None:
    """Refuse a model of which a part is on no device, as where a device_map puts it on disk.

    Raises:
        ModelLoadError: the message names the part.
    """
    away = next((name for name, weight in model.named_parameters() if weight.device.type == "meta"), None)
    if away is not None:
        raise ModelLoadError(
            f"{source} does not fit: its device_map leaves {away} on disk, where it cannot be embedded with: give more "
            "memory, a smaller dtype or another device_map"
        )
