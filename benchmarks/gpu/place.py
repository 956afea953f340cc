"""Makes a checkout importable where nothing is installed, as on a machine with a GPU and PyTorch and little else.

Installed, `llm2vec_fast.kernels` is the folder `kernels`; in a bare checkout nothing says so but this. Importing
anything of `benchmarks.gpu` does it, also as a pytest plugin (`-p benchmarks.gpu.test_log`).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]


class _KernelsInPlace(MetaPathFinder):
    """Asked last, after any installed package."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "llm2vec_fast.kernels":
            return None
        folder = ROOT / "kernels"
        return spec_from_file_location(fullname, folder / "__init__.py", submodule_search_locations=[str(folder)])


def make_importable() -> None:
    """Put the checkout and its test helpers (the tolerance rule) on the path; a second call does nothing."""
    for folder in (str(ROOT / "tests"), str(ROOT)):
        if folder not in sys.path:
            sys.path.insert(0, folder)
    if not any(isinstance(finder, _KernelsInPlace) for finder in sys.meta_path):
        sys.meta_path.append(_KernelsInPlace())
