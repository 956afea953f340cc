"""Weights sharded over processes (FSDP2) train to those of plain data parallelism."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

SHARDED = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
PROGRAM = (str(Path(__file__).with_name("sharded.py")),)
STAGES = {
    "mntp": {},
    "simcse": {"learn_scale": True},
    "contrastive": {"token_budget": 200},
}
IN_PARTS = {"state_dict_type": "SHARDED_STATE_DICT"}  # checkpoints; else one process writes all weights
IN_PARTS_OF = ("simcse", "contrastive")


def assert_same(some: Path, others: Path, name: str) -> None:
    """The same tensors but for rounding, and none of them without a change from training."""
    expected, found = load_file(others / name), load_file(some / name)
    assert found.keys() == expected.keys()
    assert all(x.any() for key, x in expected.items() if "lora_A" not in key)
    for key, x in expected.items():
        assert (found[key] - x).abs().max() <= 1e-5 * x.abs().max(), key


@pytest.mark.parametrize("stage", STAGES)
def test_sharded_weights_train_and_resume_as_whole_ones(
    stage: str, settings: Callable[..., dict[str, object]], launch: Callable, finished: Callable,
    files: dict[str, str], tmp_path: Path,
) -> None:  # fmt: skip
    shared = {"train_file": files[stage], "validation_file": files[stage], "max_seq_length": 48, **STAGES[stage]}

    def options(output: str, steps: int) -> dict[str, object]:
        # Not clipped, and with an epsilon that keeps steps in proportion: gradients of another size would show.
        scales = {"max_grad_norm": 0, "adam_epsilon": 1.0}
        return settings(output, **shared, **scales, max_steps=steps, lr_scheduler_type="constant")

    finished(launch(stage, options("whole", 4), processes=2))
    config = json.dumps({**SHARDED, **(IN_PARTS if stage in IN_PARTS_OF else {})})
    # The second goes on from the first one's checkpoint; a third has nothing to do.
    for steps in (2, 4, 4) if stage == "simcse" else (2, 4):
        given = {**options("sharded", steps), "fsdp": True, "fsdp_config": config}
        said = finished(launch(stage, given, processes=2, program=PROGRAM))
        (all_of_them,) = set(re.findall(r"sharded (\d+) of \1 parameters, largest share 0\.5\n", said))
        assert int(all_of_them) > 40
    assert_same(tmp_path / "sharded", tmp_path / "whole", "adapter_model.safetensors")
    if "learn_scale" in STAGES[stage]:
        assert_same(*(tmp_path / name / "checkpoint-4" for name in ("sharded", "whole")), "scale.safetensors")
    results = [json.loads((tmp_path / name / "eval_results.json").read_text()) for name in ("sharded", "whole")]
    assert results[0]["eval_loss"] == pytest.approx(results[1]["eval_loss"], rel=1e-5)
