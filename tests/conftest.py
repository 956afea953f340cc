"""Tests run on the CPU, Triton's kernels by its interpreter; or, by --device, on a GPU by their compiled code.

The interpreter must be chosen before Triton is imported. It does not change what backend="auto" picks: dispatch leaves
it to tests that ask for backend="triton". On a GPU a test makes its tensors there without saying so, and whatever is
tested in float16 is tested in bfloat16 too, which the interpreter cannot multiply.

Of several processes that share the tests (pytest -n), each has one thread, and so have those that it starts. Tests of
encoding have two, for the product encodes a batch a thread.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import pytest

SHARES_THE_CORES = "PYTEST_XDIST_WORKER" in os.environ
if SHARES_THE_CORES:  # before PyTorch's libraries read it
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # a thread that waits leaves its core to another process

import torch  # noqa: E402

VARIABLE = "LLM2VEC_FAST_TEST_DEVICE"
# What only a CPU has: its own kernels, its memory, processes that talk by gloo, stand-ins for a GPU.
CPU_FOLDERS = ("kernels/linear/", "llm2vec_fast/", "benchmarks/", "real/")
CPU_FILES = frozenset({
    *("test_default_device.py", "test_dispatch.py", "test_flash.py"),
    *("test_group.py", "test_memory.py", "test_parallel.py"),
})  # fmt: skip

ENCODE_A_BATCH_A_THREAD = ("real/", "llm2vec_fast/engine/", "llm2vec_fast/bulk/", "llm2vec_fast/test_encoder.py")

os.environ["TRITON_INTERPRET"] = "1"  # before anything can have imported Triton; --device takes it back


def pytest_addoption(parser: pytest.Parser) -> None:
    device = os.environ.get(VARIABLE, "cpu")
    with suppress(ValueError):  # a copy of this file beside made-up tests has added it
        parser.addoption("--device", default=device, help=f"cpu or cuda: where kernel tests run (${VARIABLE})")


def pytest_configure(config: pytest.Config) -> None:
    device = config.getoption("--device")
    if device == "cpu":
        return
    os.environ["TRITON_INTERPRET"] = "0"
    torch.set_default_device(device)

    class GeneratorOnDevice(torch.Generator):
        """Tests seed `torch.Generator()`, which would be one for the CPU."""

        def __new__(cls, device: str = device) -> torch.Generator:
            return super().__new__(cls, device)

    torch.Generator = GeneratorOnDevice


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """On a GPU, add a bfloat16 test to every float16 one."""
    if metafunc.config.getoption("--device") == "cpu":
        return
    definition = metafunc.definition
    for holder in (definition, *definition.listchain()):
        holder.own_markers[:] = [_with_bfloat16(mark) for mark in holder.own_markers]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--device") == "cpu":
        return
    for item in items:
        path, function = item.path.as_posix(), getattr(item, "function", None)
        speaks = function is not None and re.search(r"\bcpu\b", inspect.getsource(function))
        if speaks or item.path.name in CPU_FILES or any(f"tests/{part}" in path for part in CPU_FOLDERS):
            item.add_marker(pytest.mark.skip(reason="it is about the CPU"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if SHARES_THE_CORES:
        torch.set_num_threads(
            2 if any(f"tests/{part}" in item.path.as_posix() for part in ENCODE_A_BATCH_A_THREAD) else 1
        )


def _with_bfloat16(mark: pytest.Mark) -> pytest.Mark:
    if mark.name != "parametrize":
        return mark
    names = [name.strip() for name in mark.args[0].split(",")] if isinstance(mark.args[0], str) else list(mark.args[0])
    if "dtype" not in names or len(mark.args) < 2:
        return mark
    values = [_values(each, len(names)) for each in mark.args[1]]
    at = names.index("dtype")
    have = {tuple(map(repr, value)) for value in values}
    more = [[torch.bfloat16 if i == at else x for i, x in enumerate(v)] for v in values if v[at] is torch.float16]
    added = [_parameter(value) for value in more if tuple(map(repr, value)) not in have]
    ids = mark.kwargs.get("ids")
    named = {"ids": [*ids, *("bfloat16" for _ in added)]} if isinstance(ids, list | tuple) else {}
    arguments = (mark.args[0], [*mark.args[1], *added])
    return pytest.Mark("parametrize", arguments, {**mark.kwargs, **named}, _ispytest=True)


def _values(parameter: Any, count: int) -> list[Any]:
    if hasattr(parameter, "values") and hasattr(parameter, "marks"):
        return list(parameter.values)
    return [parameter] if count == 1 else list(parameter)


def _parameter(values: Iterable[Any]) -> Any:
    values = list(values)
    return pytest.param(*values, id="-".join(str(x).removeprefix("torch.") for x in values))
