"""The project installs as a wheel and as a checkout, works from any folder, and imports quickly."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
BUILT = shutil.ignore_patterns(".*", "build", "dist", "demo", "*.egg-info", "__pycache__")
OFFLINE = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
UNPUBLISHED = {"flash_attn_interface"}  # FlashAttention-3 is built from source


def run(*command: str | Path, cwd: Path) -> str:
    """What the command printed, run with no Python path of ours."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, so that building leaves nothing in it and finds nothing of earlier builds."""
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("source") / "llm2vec-fast", ignore=BUILT))


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", *OFFLINE, "--wheel-dir", folder, source, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


def clean_environment(folder: Path) -> Path:
    """A new environment in ``folder``; its Python.

    It borrows PyTorch and the other dependencies from the running environment through a .pth file, since installing
    gigabytes again would take minutes. Python reads no .pth files of a folder that a .pth file added, so the running
    environment's own editable install of this project stays out, and so do the project's metadata, which the new
    environment's come before.
    """
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    packages = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    borrowed = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    Path(packages, "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    return python


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a clean environment with the wheel in it."""
    python = clean_environment(tmp_path_factory.mktemp("wheel-environment"))
    run(sys.executable, "-m", "pip", "--python", python, "install", *OFFLINE, wheel, cwd=wheel.parent)
    return python


@pytest.fixture(scope="module")
def editable(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a clean environment with the checkout in it, editable."""
    python = clean_environment(tmp_path_factory.mktemp("editable-environment"))
    run(sys.executable, "-m", "pip", "--python", python, "install", *OFFLINE, "--editable", source, cwd=python.parent)
    return python


def test_the_wheel_holds_the_product_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    version = metadata.version("llm2vec-fast")
    assert {name.split("/")[0] for name in names} == {"llm2vec_fast", f"llm2vec_fast-{version}.dist-info"}
    product = {path.relative_to(ROOT) for path in (ROOT / "llm2vec_fast").rglob("*.py")}
    kernels = {Path("llm2vec_fast", path.relative_to(ROOT)) for path in (ROOT / "kernels").rglob("*.py")}
    assert {Path(name) for name in names if name.endswith(".py")} == product | kernels
    data = [(ROOT / "llm2vec_fast").rglob(pattern) for pattern in ("*.yaml", "*.safetensors", "*.json", "README.md")]
    expected = {str(path.relative_to(ROOT)) for paths in data for path in paths} | {"llm2vec_fast/py.typed"}
    assert {name for name in names if name.startswith("llm2vec_fast/") and not name.endswith(".py")} == expected


def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    (said,) = metadata.distributions(path=[str(wheel)])
    assert said.metadata["Name"] == "llm2vec-fast"
    assert said.metadata["License-Expression"] == "MIT"
    assert any(file.name == "LICENSE" for file in said.files or ())
    assert said.metadata.get_payload().startswith("# llm2vec-fast")  # the README


def test_an_installed_wheel_runs_from_any_folder(installed: Path, tmp_path: Path) -> None:
    program = "import llm2vec_fast, llm2vec_fast.kernels as k; print(llm2vec_fast.__file__, k.__file__, sep='\\n')"
    for file in run(installed, "-c", program, cwd=tmp_path).split():
        assert Path(file).is_relative_to(installed.parents[1]), file
    report = run(installed.with_name("llm2vec-fast"), "doctor", cwd=tmp_path)
    assert metadata.version("llm2vec-fast") in report
    assert metadata.version("transformers") in report


def test_an_editable_install_runs_from_any_folder(editable: Path, source: Path, tmp_path: Path) -> None:
    program = "import llm2vec_fast, llm2vec_fast.kernels as k; print(llm2vec_fast.__file__, k.__file__, sep='\\n')"
    files = run(editable, "-c", program, cwd=tmp_path).split()
    assert files == [str(source / "llm2vec_fast" / "__init__.py"), str(source / "kernels" / "__init__.py")]
    assert run(editable.with_name("llm2vec-fast"), "--version", cwd=tmp_path).strip() == metadata.version(
        "llm2vec-fast"
    )


def test_importing_the_package_imports_no_framework(installed: Path, tmp_path: Path) -> None:
    program = "import sys, llm2vec_fast; print(*sorted({'torch', 'transformers', 'numpy', 'peft'} & set(sys.modules)))"
    assert run(installed, "-c", program, cwd=tmp_path).split() == []


def test_in_a_checkout_transformers_does_not_take_the_folder_for_the_package_of_its_name(editable: Path) -> None:
    # `python` in the root of a checkout has the root on sys.path, and transformers imports a package `kernels` there.
    program = (
        "import sys, transformers.modeling_utils, llm2vec_fast.kernels;"
        "from transformers.utils import is_kernels_available;"
        "print(is_kernels_available(), *(name for name in sys.modules if name.startswith('kernels.')))"
    )
    assert run(editable, "-c", program, cwd=ROOT).split() == ["False"]


def test_every_package_imported_is_required(wheel: Path) -> None:
    (said,) = metadata.distributions(path=[str(wheel)])
    always = {_name(line) for line in said.requires or () if "extra ==" not in line}
    extras = {_name(line) for line in said.requires or ()} - always
    owners = metadata.packages_distributions()
    for path in (*(ROOT / "llm2vec_fast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        at_once = set(_imported(tree.body))
        modules = at_once.union(_imported(ast.walk(tree))) - sys.stdlib_module_names - {"llm2vec_fast"} - UNPUBLISHED
        for module in modules:
            # Extras are imported where they are used, but for the package that is of no use without its own.
            needed = module in at_once and "training" not in path.parts
            allowed = always if needed else always | extras
            assert allowed.intersection(map(_name, owners.get(module, [module]))), (
                f"{path} imports {module}, not in setup.py"
            )


def _name(requirement: str) -> str:
    return canonicalize_name(Requirement(requirement).name)


def _imported(nodes: Iterable[ast.AST]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (name.name.split(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield (node.module or "").split(".")[0]
