"""Several processes on this machine, joined by gloo: how tests start them, and how these end."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing


def on_ranks(count: int, folder: Path, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What ``function(rank, *arguments)`` returned on each rank; it must be importable by name."""
    multiprocessing.spawn(_rank, (count, str(folder), function, arguments), nprocs=count)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(count)]


def _rank(rank: int, count: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", rendezvous, timedelta(minutes=5), world_size=count, rank=rank)
    torch.save(function(rank, *arguments), f"{folder}/{rank}.pt")
    dist.barrier()  # nobody leaves while another still waits for rows from it
    # Without freeing the group: what ran in a backward pass holds a Python object that gloo's thread frees under the
    # GIL, and a main thread that frees the group holds the GIL until gloo's thread has ended (torch 2.8 to 2.13).
    os._exit(0)
