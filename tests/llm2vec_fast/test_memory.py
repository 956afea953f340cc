"""Memory given back is read again from its file, and only what nobody has written to is given back."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm2vec_fast.memory import release_file_pages

ROWS = 1024  # of 4 KiB each: a page or more
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pages are given back on Linux only")


@pytest.fixture
def mapped(tmp_path: Path) -> torch.Tensor:
    """A tensor as safetensors maps it from a file; its values are its positions."""
    save_file({"weight": torch.arange(ROWS * 1024, dtype=torch.float32)}, tmp_path / "model.safetensors")
    return load_file(tmp_path / "model.safetensors")["weight"]


def resident_bytes(tensor: torch.Tensor) -> int:
    """What the kernel counts as resident of the mapping that holds the tensor."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if not head.endswith(":"):
            first, last = (int(part, 16) for part in head.split("-"))
            inside = first <= tensor.data_ptr() < last
        elif inside and head == "Rss:":
            return int(line.split()[1]) * 1024
    raise AssertionError("the tensor lies in no mapping")


def test_pages_of_a_file_are_given_back_and_read_again(mapped: torch.Tensor) -> None:
    expected = mapped.sum()
    before = resident_bytes(mapped)
    released = release_file_pages(mapped)
    assert released > 0.99 * mapped.nbytes
    assert resident_bytes(mapped) <= before - 0.9 * mapped.nbytes
    assert mapped.sum() == expected


def test_what_was_written_to_is_kept(mapped: torch.Tensor) -> None:
    middle = len(mapped) // 2
    mapped[middle] = -1.0
    assert release_file_pages(mapped) == 0
    assert mapped[middle] == -1.0


def test_a_tensor_of_no_file_is_kept() -> None:
    tensor = torch.arange(ROWS * 1024, dtype=torch.float32)
    assert release_file_pages(tensor) == 0
    assert tensor[-1] == ROWS * 1024 - 1
