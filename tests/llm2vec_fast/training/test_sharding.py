"""Weights sharded over processes (FSDP2) train to those of plain data parallelism."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SHARDED = {
    "fsdp": "full_shard",
    "fsdp_config": '{"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}',
}


@pytest.mark.parametrize("stage", ["mntp", "simcse", "contrastive"])
def test_sharded_weights_train_as_whole_ones(
    stage: str, settings: Callable[..., dict[str, object]], launch: Callable, finished: Callable,
    files: dict[str, str], tmp_path: Path,
) -> None:  # fmt: skip
    weights = {}
    for name, sharding in (("whole", {}), ("sharded", SHARDED)):
        options = settings(name, train_file=files[stage], max_steps=2, save_strategy="no", max_seq_length=48)
        finished(launch(stage, {**options, **sharding}, processes=2))
        weights[name] = load_file(tmp_path / name / "adapter_model.safetensors")
    assert weights["whole"].keys() == weights["sharded"].keys()
    assert all(x.any() for name, x in weights["whole"].items() if "lora_B" in name)
    for name, x in weights["whole"].items():
        torch.testing.assert_close(weights["sharded"][name], x, rtol=1e-5, atol=1e-7, msg=name)
