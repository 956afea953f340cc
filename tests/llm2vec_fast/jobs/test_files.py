"""Files are whole or not there, and nobody else's file is ever touched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llm2vec_fast.errors import OutputError
from llm2vec_fast.jobs.files import (
    append_lines,
    read_json_lines,
    remove_leftovers,
    remove_own,
    replace_json,
    replacing,
)

KILLED_WHILE_WRITING = """
import os, signal, sys
from pathlib import Path
from llm2vec_fast.jobs.files import replacing
with replacing(Path(sys.argv[1])) as file:
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_process_killed_while_it_writes_leaves_the_old_file_and_one_that_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    path.write_text("old")
    own = [tmp_path / name for name in ("value.json.tmp", "notes.tmp", ".value.json.tmp", ".x.llm2vec-fast.tmp.txt")]
    for file in own:
        file.write_text("the user's")
    (tmp_path / ".folder.llm2vec-fast.tmp").mkdir()
    process = subprocess.run([sys.executable, "-c", KILLED_WHILE_WRITING, str(path)])
    assert process.returncode < 0
    assert path.read_text() == "old"
    before = set(tmp_path.iterdir())
    remove_leftovers(tmp_path)
    [removed] = before - set(tmp_path.iterdir())
    assert removed.name.startswith("."), "a dataset reader would read it"
    assert all(file.read_text() == "the user's" for file in own)


def test_what_fails_leaves_the_old_file_alone_in_the_folder(tmp_path: Path) -> None:
    path = tmp_path / "value"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(path) as file:
        file.write(bytes(1 // 0))
    with pytest.raises(OutputError, match=r"no space left to write value in "), replacing(path):
        raise OSError(28, os.strerror(28))
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("value", "old")]


def test_a_replaced_file_has_the_rights_that_new_files_have(tmp_path: Path) -> None:
    (tmp_path / "new").write_text("")
    replace_json(tmp_path / "value.json", {})
    assert (tmp_path / "value.json").stat().st_mode == (tmp_path / "new").stat().st_mode


def test_a_torn_line_takes_no_new_line_with_it(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    append_lines(path, [b'{"n": 1}'])
    with open(path, "ab") as file:
        file.write(b'{"n": 2, "te')
    append_lines(path, [b'{"n": 3}', b"[4]"])
    assert list(read_json_lines(path)) == [{"n": 1}, {"n": 3}]


def test_text_that_is_no_utf8_is_written_and_comes_back(tmp_path: Path) -> None:
    value = {"latin-1 file name": os.fsdecode(b"caf\xe9.txt"), "half a pair": "\ud800", "letters": "ü漢"}
    replace_json(tmp_path / "value.json", value)
    content = (tmp_path / "value.json").read_bytes()
    assert json.loads(content.decode("utf-8")) == value
    assert "ü漢".encode() in content


def test_only_own_files_are_removed_with_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    for name in ("part-1", "part-2", "thesis"):
        (folder / name).write_text("")
    remove_own(folder, ("part-*",))
    assert [path.name for path in folder.iterdir()] == ["thesis"]
    remove_own(folder, ("thesis",))
    assert not folder.exists()
