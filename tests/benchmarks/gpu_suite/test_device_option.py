"""`pytest --device`: kernel tests make their tensors on the device, and float16 tests run in bfloat16 as well.

"meta" stands for a GPU: a device that tensors can be made on, though not computed with.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
TESTS = """
import os
import pytest
import torch

@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_one(dtype):
    assert torch.zeros(2, dtype=dtype).device.type == {device!r}
    assert os.environ["TRITON_INTERPRET"] == {interpret!r}

@pytest.mark.parametrize(
    ("backend", "dtype"), [("blocked", torch.bfloat16), ("blocked", torch.float16), ("triton", torch.float16)]
)
def test_two(backend, dtype):
    pass

@pytest.mark.parametrize(("size", "dtype"), [(3, torch.float16)], ids=["three"])
def test_three(size, dtype):
    pass

def test_autocast():
    with torch.autocast("cpu"):
        raise AssertionError("it is about the CPU")
"""


def _outcomes(folder, device, interpret):
    folder.joinpath("conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    folder.joinpath("test_made_up.py").write_text(TESTS.format(device=device, interpret=interpret))
    environment = {name: value for name, value in os.environ.items() if name != "LLM2VEC_FAST_TEST_DEVICE"}
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--device", device, str(folder)]
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    lines = [line.split("::")[1] for line in run.stdout.splitlines() if "::" in line and "%]" in line]
    return {line.split()[0]: line.split()[1] for line in lines}


def test_on_a_device_every_float16_test_has_a_bfloat16_one(tmp_path):
    outcomes = _outcomes(tmp_path, "meta", "0")
    assert outcomes.pop("test_autocast") == "SKIPPED"
    assert set(outcomes.values()) == {"PASSED"}
    assert [name for name in outcomes if name.startswith("test_one")] == [
        "test_one[torch.float32]", "test_one[torch.float16]", "test_one[bfloat16]",
    ]  # fmt: skip
    assert [name for name in outcomes if name.startswith("test_two")] == [
        "test_two[blocked-dtype0]", "test_two[blocked-dtype1]", "test_two[triton-dtype2]", "test_two[triton-bfloat16]",
    ]  # fmt: skip
    assert [name for name in outcomes if name.startswith("test_three")] == [
        "test_three[three]",
        "test_three[3-bfloat16]",
    ]


def test_on_a_cpu_tests_are_as_written(tmp_path):
    outcomes = _outcomes(tmp_path, "cpu", "1")
    assert outcomes.pop("test_autocast") == "FAILED"
    assert set(outcomes.values()) == {"PASSED"}
    assert not [name for name in outcomes if "bfloat16" in name]
