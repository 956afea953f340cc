"""The command line within the test's own process: importing PyTorch and transformers anew takes seconds a command."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest

from llm2vec_fast.cli import main


@pytest.fixture
def invoke(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`llm2vec-fast …` with what it printed and its exit code."""

    def invoke(*arguments: object) -> subprocess.CompletedProcess[str]:
        words = [str(argument) for argument in arguments]
        monkeypatch.setattr(sys, "argv", ["llm2vec-fast", *words])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess(words, int(end.value.code or 0), out, err)

    return invoke
