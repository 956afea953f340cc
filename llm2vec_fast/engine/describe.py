"""What the last bits of embeddings depend on beside the model, the texts and the settings."""

from __future__ import annotations

import torch

from .replica import Replica


def describe(replica: Replica, device: torch.device) -> dict[str, str | int]:
    """How this machine computes; where two of these are equal, so is every bit of the results.

    On a CPU: the number of threads (products of one batch on all cores are summed in an order that depends on it; a
    batch on a core of its own is not) and whether weights are packed, which the machine's memory decides.
    """
    if device.type != "cpu":
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        return {"device": name}
    return {
        "device": "cpu",
        "instruction set": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "packed weights": replica.left.get("linear", "yes") if replica.accelerated else "no: accelerate is off",
    }
