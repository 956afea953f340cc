"""No two files import each other, and nothing imports upward."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PRODUCT = Path(__file__).parents[2]
# What a room must not know, the rooms above it.
ABOVE = {
    "kernels": ("llm2vec_fast",),
    "llm2vec_fast.data": tuple(f"llm2vec_fast.{x}" for x in ("encoder", "bulk", "mining", "training", "cli")),
    "llm2vec_fast.jobs": tuple(f"llm2vec_fast.{x}" for x in ("encoder", "bulk", "mining", "training", "cli")),
    "llm2vec_fast.loading": tuple(f"llm2vec_fast.{x}" for x in ("encoder", "engine", "bulk", "training", "cli")),
    "llm2vec_fast.engine": tuple(f"llm2vec_fast.{x}" for x in ("encoder", "loading", "bulk", "training", "cli")),
}


def modules() -> dict[str, Path]:
    files = [path for room in ("llm2vec_fast", "kernels") for path in (PRODUCT / room).rglob("*.py")]
    return {".".join(path.relative_to(PRODUCT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


def imported(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The modules that a file imports, anywhere in it."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            level = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*level, *([node.module] if node.module else [])])
            found |= {f"{base}.{a.name}" if f"{base}.{a.name}" in known else base for a in node.names}
    return found - {name}


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    known = modules()
    assert len(known) > 100  # or nothing was looked at
    return {name: imported(name, path, known) for name, path in known.items()}


def test_no_two_files_import_each_other(imports):
    graph = {name: {x for x in found if x in imports} for name, found in imports.items()}
    assert sum(map(len, graph.values())) > len(graph)
    TopologicalSorter(graph).prepare()  # a CycleError names the circle


@pytest.mark.parametrize("room", ABOVE)
def test_rooms_do_not_know_those_above(room, imports):
    inside = {name: found for name, found in imports.items() if f"{name}.".startswith(f"{room}.")}
    assert inside
    known = {
        (name, x)
        for name, found in inside.items()
        for x in found
        if f"{x}.".startswith(tuple(f"{a}." for a in ABOVE[room]))
    }
    assert not known
