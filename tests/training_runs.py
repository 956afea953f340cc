"""Whether two training runs took the same steps, their size included."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.torch import load_file

# Clipping would give gradients of any size one norm; plain descent moves weights by as much as the gradients say.
UNCLIPPED = {"optim": "sgd", "max_grad_norm": 0, "lr_scheduler_type": "constant", "lora_dropout": 0.0}
_TOLERANCE = 1e-4  # of a loss, a gradient's norm, and the way that the weights went


def assert_trained_alike(one: Path, other: Path) -> None:
    """Of runs with `UNCLIPPED`: the same loss and norm of gradients at every step, and the same adapter at the end."""
    np.testing.assert_allclose(_steps(other), _steps(one), rtol=_TOLERANCE)
    expected, found = (load_file(path / "adapter_model.safetensors") for path in (one, other))
    assert found.keys() == expected.keys()
    moved = max(float(x.abs().max()) for name, x in expected.items() if "lora_B" in name)  # they start at zero
    assert moved > 1e-3
    for name, x in expected.items():
        assert float((found[name] - x).abs().max()) <= _TOLERANCE * moved, name


def _steps(folder: Path) -> list[tuple[float, float]]:
    """Loss and norm of the gradients of each step."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    steps = [(line["loss"], line["grad_norm"]) for line in history if "loss" in line]
    assert len(steps) > 1
    return steps
