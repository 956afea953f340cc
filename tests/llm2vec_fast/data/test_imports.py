"""The room imports nothing above it, nothing that takes seconds, and no two of its files import each other."""

from __future__ import annotations

import ast
from pathlib import Path

import llm2vec_fast.data

ROOM = "llm2vec_fast.data"
HEAVY = {"torch", "transformers", "datasets", "pandas"}


def imported() -> dict[str, set[str]]:
    """The modules that each file of the room imports, wherever in it."""
    found = {}
    for path in Path(str(llm2vec_fast.data.__file__)).parent.glob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        names = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
        names |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        found[f"{ROOM}.{path.stem}"] = names
    return found


def test_the_room_knows_nothing_of_those_above_it() -> None:
    names = {name for found in imported().values() for name in found}
    own = {name for name in names if name.startswith("llm2vec_fast")}
    assert {name for name in own if not name.startswith(ROOM)} <= {"llm2vec_fast.errors"}
    assert not {name.split(".")[0] for name in names} & HEAVY


def test_no_files_import_each_other() -> None:
    left = {name: {other for other in found if other.startswith(ROOM)} for name, found in imported().items()}
    while free := [name for name, found in left.items() if not found & left.keys()]:
        for name in free:
            del left[name]
    assert not left
