"""The suite finds the checkout's kernels where nothing is installed, under the name they have when installed."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
CODE = """
import sys
# An editable install is a finder of its own; without it this is a bare checkout.
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
sys.path[:] = [folder for folder in sys.path if folder]
sys.path.insert(0, {root!r})
try:
    import llm2vec_fast.kernels
except ModuleNotFoundError:
    print("bare")
    import benchmarks.gpu
    import llm2vec_fast.kernels.attention, numerics
    print(llm2vec_fast.kernels.__file__, "kernels" in sys.modules)
"""


def test_a_bare_checkout_is_enough():
    command = [sys.executable, "-c", CODE.format(root=str(ROOT))]
    run = subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=120, check=True)
    assert run.stdout.split() == ["bare", str(ROOT / "kernels" / "__init__.py"), "False"]
