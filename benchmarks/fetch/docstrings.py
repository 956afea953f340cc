"""About 10,000 real English texts that lie on every machine: the docstrings of the running Python's standard library.

Those of modules written in Python are read from their source, without importing them; those of modules written in C
come from the modules themselves, whose import runs no Python code. Order and ids are the same in every run of one
interpreter. `python -m benchmarks.fetch.docstrings FILE` writes them as JSON lines.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import json
import os
import sys
import sysconfig
import types
import warnings
from collections.abc import Iterator
from importlib.machinery import BuiltinImporter, ExtensionFileLoader
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "__pycache__", "__hello__", "test", "tests", "idle_test"})
NOT_LIBRARY_C = ("_test", "_xx", "xx", "_ctypes_test")
DOCUMENTED_IN_C = (
    type,
    types.BuiltinFunctionType,
    types.ClassMethodDescriptorType,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
    types.MethodDescriptorType,
)


class Docstring(NamedTuple):
    """A text and where it stands: "csv.DictReader"; a second definition of a name is "subprocess.Popen.wait#2"."""

    id: str
    text: str


def collect() -> list[Docstring]:
    """Every docstring of the standard library once, tests left out; ids are unique, and so are texts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of modules about to be removed, and of their source
        found = [*_from_source(Path(sysconfig.get_path("stdlib"))), *_from_c()]
    seen: set[str] = set()
    count: dict[str, int] = {}
    docstrings = []
    for name, text in found:
        if not text.strip() or text in seen:
            continue
        seen.add(text)
        count[name] = count.get(name, 0) + 1
        docstrings.append(Docstring(name if count[name] == 1 else f"{name}#{count[name]}", text))
    return docstrings


def write(path: Path) -> int:
    """Write them to ``path`` as JSON lines with the fields id and text, beside first and then renamed; their number."""
    docstrings = collect()
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(each._asdict(), ensure_ascii=False) + "\n" for each in docstrings)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    return len(docstrings)


def _from_source(root: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if NOT_LIBRARY.isdisjoint(parts):
            yield from of_file(path, ".".join(parts).removesuffix(".__init__"))


def of_file(path: Path, module: str) -> Iterator[tuple[str, str]]:
    """Where each docstring of a file stands, and the docstring, or "" where there is none; the file is not run."""
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError:  # templates and samples of older Pythons lie among the modules
        return
    yield module, ast.get_docstring(tree) or ""
    yield from _of_definitions(tree, module)


def _of_definitions(node: ast.AST, prefix: str) -> Iterator[tuple[str, str]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{prefix}.{child.name}", ast.get_docstring(child) or ""
            yield from _of_definitions(child, f"{prefix}.{child.name}")
        else:
            yield from _of_definitions(child, prefix)


def _from_c() -> Iterator[tuple[str, str]]:
    for name in sorted(sys.stdlib_module_names):
        if name.startswith(NOT_LIBRARY_C) or not _is_written_in_c(name):
            continue
        try:
            module = importlib.import_module(name)
        except ImportError:  # built without the system library it wraps
            continue
        yield name, inspect.cleandoc(module.__doc__ or "")
        yield from _of_members(module, name)


def _is_written_in_c(name: str) -> bool:
    if name == "sys":  # programs put their own functions in place of its hooks: it differs between processes
        return False
    spec = find_spec(name)
    return spec is not None and (spec.loader is BuiltinImporter or isinstance(spec.loader, ExtensionFileLoader))


def _of_members(owner: types.ModuleType | type, prefix: str) -> Iterator[tuple[str, str]]:
    for name, member in sorted(vars(owner).items()):
        if name.startswith("__") or not isinstance(member, DOCUMENTED_IN_C):
            continue
        text = member.__doc__
        yield f"{prefix}.{name}", inspect.cleandoc(text) if isinstance(text, str) else ""
        if isinstance(member, type) and isinstance(owner, types.ModuleType):
            yield from _of_members(member, f"{prefix}.{name}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fetch.docstrings", description=__doc__)
    parser.add_argument("file", type=Path, help="the JSON lines file to write")
    path = parser.parse_args().file
    print(f"{write(path):,} docstrings of Python {sys.version.split()[0]} written to {path}")


if __name__ == "__main__":
    main()
