"""What the last bits of embeddings depend on beside the model, the texts, the settings and the device."""

from __future__ import annotations

import torch

from .replica import Replica


def describe(replica: Replica, device: torch.device) -> dict[str, str | int]:
    """How results are computed here, by what may differ from one run to the next.

    On a CPU that is the number of threads (products of a batch that all cores share are summed in an order that depends
    on it; a batch on a core of its own is not), and whether weights are packed, which the machine's memory decides.
    """
    if device.type != "cpu":
        return {}
    packed = replica.left.get("linear", "yes") if replica.accelerated else "no: accelerate is off"
    return {"threads": torch.get_num_threads(), "packed weights": packed}
