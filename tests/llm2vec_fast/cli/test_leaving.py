"""How processes that train together end: what was asked of their end is done, and Python is not taken down."""

import subprocess
import sys
from pathlib import Path

import pytest

PROCESS = """
import atexit, sys
import torch.distributed as dist
from llm2vec_fast import cli

class Freed:
    def __del__(self):
        print("taken down")

kept = Freed()
if sys.argv[1] == "together":
    dist.init_process_group("gloo", f"file://{sys.argv[2]}", world_size=1, rank=0)
atexit.register(print, "tracker finished")

def verb():
    print("trained", end=" ")
    raise SystemExit(int(sys.argv[3]))

cli._run = verb
cli.main()
"""


@pytest.mark.parametrize("code", [0, 3])
@pytest.mark.parametrize(
    ("place", "printed"),
    [("together", "trained tracker finished\n"), ("alone", "trained tracker finished\ntaken down\n")],
)
def test_a_process_of_several_ends_at_once_and_whole(place: str, printed: str, code: int, tmp_path: Path) -> None:
    words = [sys.executable, "-c", PROCESS, place, str(tmp_path / "rendezvous"), str(code)]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert (ended.returncode, ended.stdout) == (code, printed), ended.stderr
