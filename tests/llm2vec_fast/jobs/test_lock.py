"""One process a folder, and a sentence where there can be no lock."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import filelock
import pytest

from llm2vec_fast.errors import JobRunningError, OutputError
from llm2vec_fast.jobs.lock import HOLDER, only_job


def test_the_second_is_told_who_holds_it_and_what(tmp_path: Path) -> None:
    with (
        only_job(tmp_path, Path("out.jsonl")),
        pytest.raises(JobRunningError, match=rf"another job \(process {os.getpid()} on .*\) is writing out\.jsonl"),
        only_job(tmp_path, Path("out.jsonl")),
    ):
        pass
    with only_job(tmp_path, Path("out.jsonl")):
        pass


@pytest.mark.parametrize("content", ["", "[]", "{}", "nothing"])
def test_a_holder_that_cannot_be_read_is_not_known(tmp_path: Path, content: str) -> None:
    with only_job(tmp_path, Path("out")):
        (tmp_path / HOLDER).write_text(content)
        with pytest.raises(JobRunningError, match="its process is not known"), only_job(tmp_path, Path("out")):
            pass


@pytest.mark.parametrize(
    "error", [PermissionError(errno.EACCES, "Permission denied"), NotImplementedError("no locks here")], ids=str
)
def test_a_place_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def refuse(self: object) -> None:
        raise error

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    message = r"out cannot be written .*(Permission denied|no locks here)"
    with pytest.raises(OutputError, match=message), only_job(tmp_path, Path("out")):
        pass
