"""`llm2vec-fast` with weights sharded (FSDP2) on a CPU, too: accelerate alone leaves every process all of them."""

from __future__ import annotations

from typing import Any

from accelerate import accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.tensor import DTensor

from llm2vec_fast.cli import main

_init, _prepare = AcceleratorState.__init__, accelerator.fsdp2_prepare_model


def _init_sharding(self: AcceleratorState, *arguments: Any, fsdp_plugin: Any = None, **keywords: Any) -> None:
    _init(self, *arguments, fsdp_plugin=fsdp_plugin, **keywords)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP  # as accelerate does on GPUs


def _prepare_and_count(*arguments: Any) -> nn.Module:
    model = _prepare(*arguments)
    parameters = list(model.parameters())
    largest = max(x.to_local().numel() / x.numel() for x in parameters if isinstance(x, DTensor))
    sharded = sum(isinstance(x, DTensor) for x in parameters)
    print(f"sharded {sharded} of {len(parameters)} parameters, largest share {largest}", flush=True)
    return model


if __name__ == "__main__":
    AcceleratorState.__init__ = _init_sharding
    accelerator.fsdp2_prepare_model = _prepare_and_count
    main()
