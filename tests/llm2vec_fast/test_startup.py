"""What a first vector imports, and that nothing imports what a system lacks."""

from __future__ import annotations

import ast
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from reference_data import FOLDER

import llm2vec_fast

ROOT = Path(__file__).parents[2]
# Each takes a tenth of a second or more to import, and none of them makes a vector.
HEAVY = (
    *(
        "IPython",
        "datasets",
        "evaluate",
        "gguf",
        "hypothesis",
        "ipywidgets",
        "matplotlib",
        "mwparserfromhell",
        "pandas",
    ),
    *("pyarrow", "pytest", "seaborn", "sentence_transformers", "seqeval", "sklearn", "tensorboard", "tensorflow"),
    *("transformers.trainer", "transformers.pipelines", "torch.utils.tensorboard", "torchvision", "typer", "wandb"),
)
ONLY_POSIX = {"crypt", "fcntl", "grp", "nis", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}
FIRST_VECTOR = """
import gc, json, sys
import llm2vec_fast
assert "torch" not in sys.modules, "import llm2vec_fast is not light"
llm2vec_fast.LLM2Vec
assert gc.isenabled() and not gc.get_freeze_count(), "the caller's garbage is not collected any more"
embedding = llm2vec_fast.LLM2Vec.from_pretrained(sys.argv[1], device="cpu", dtype="float32").encode("a first text")
print(json.dumps([embedding.shape[0], sorted(sys.modules)]))
"""


def test_a_first_vector_imports_nothing_that_does_not_make_it() -> None:
    process = subprocess.run(
        [sys.executable, "-c", FIRST_VECTOR, str(FOLDER / "llama")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    assert "leaked" not in process.stderr
    width, modules = json.loads(process.stdout.splitlines()[-1])
    assert width > 0
    assert "torch" in modules
    assert not set(HEAVY) & set(modules)


@pytest.mark.parametrize("enabled", [True, False])
def test_an_import_that_fails_leaves_the_collector_as_it_was(monkeypatch: pytest.MonkeyPatch, enabled: bool) -> None:
    monkeypatch.setitem(llm2vec_fast._HOMES, "LLM2Vec", ".nowhere")
    was = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        with pytest.raises(ModuleNotFoundError):
            _ = llm2vec_fast.LLM2Vec
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if was else gc.disable)()


@pytest.mark.parametrize("package", ["llm2vec_fast", "kernels"])
def test_no_module_needs_one_that_only_posix_has(package: str) -> None:
    """At its import: Windows has none of them."""
    found = []
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found += [(path.name, name) for name in names if (name or "").split(".")[0] in ONLY_POSIX]
    assert not found
