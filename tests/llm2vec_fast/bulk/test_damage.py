"""Finished parts that were damaged are made again, files of others stay, and `verify` names what is wrong."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_encoder import FakeEncoder
from folders import errors, flip_a_bit, manifest, parts

from llm2vec_fast.bulk import checking
from llm2vec_fast.bulk.job import Outcome, embed
from llm2vec_fast.bulk.manifest import read_manifest
from llm2vec_fast.bulk.search import search
from llm2vec_fast.bulk.settings import EmbedSettings
from llm2vec_fast.bulk.verify import verify
from llm2vec_fast.errors import InputError, OutputError

Run = Callable[..., Outcome]


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    """45 lines, every seventh of them empty: 5 parts that each leave a row out."""
    path = tmp_path / "lines.txt"
    path.write_text("".join("\n" if row % 7 == 3 else f"text number {row}\n" for row in range(45)))
    return path


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def other_rows(path: Path) -> None:
    path.write_bytes(path.with_name("part-00000.parquet").read_bytes())


DAMAGE = {"zeros": zeros, "cut": cut, "gone": Path.unlink, "bit": flip_a_bit, "part-of-other-rows": other_rows}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("finished", [True, False], ids=["finished", "unfinished"])
def test_a_damaged_part_is_made_again_and_said(
    run: Run, lines: Path, tmp_path: Path, damage: Callable[[Path], None], finished: bool
) -> None:
    run(lines)
    before, told = parts(tmp_path / "out"), errors(tmp_path / "out")
    victims = [tmp_path / "out" / "part-00002.parquet"]
    if not finished:
        victims.append(tmp_path / "out" / "part-00004.parquet")
        victims[1].unlink()
    damage(victims[0])
    assert f"{victims[0].name} " in " ".join(verify(tmp_path / "out").faults)
    encoder, said = FakeEncoder(), []
    run(lines, encoder=encoder, notify=said.append)
    assert encoder.calls == len(victims)
    assert parts(tmp_path / "out") == before
    assert errors(tmp_path / "out") == told
    assert [line for line in said if line.startswith("part-00002.parquet ") and line.endswith(": it is made again")]
    assert not verify(tmp_path / "out").faults


def test_parts_that_nobody_touched_are_read_once(
    run: Run, lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(lines)
    read: list[str] = []
    sha256_of = checking.sha256_of
    monkeypatch.setattr(checking, "sha256_of", lambda path: read.append(path.name) or sha256_of(path))
    run(lines)
    assert not read, "the job that wrote them had their checksums"
    (tmp_path / "out" / ".job" / "checked.json").write_text("[")
    run(lines)
    assert len(read) == 5
    run(lines)
    assert len(read) == 5
    os.utime(tmp_path / "out" / "part-00001.parquet")
    run(lines)
    assert read[5:] == ["part-00001.parquet"]
    assert not verify(tmp_path / "out").faults
    assert len(read) == 11, "verify reads all"


def test_what_verify_found_the_next_job_makes_again_though_no_time_tells_of_it(
    run: Run, lines: Path, tmp_path: Path
) -> None:
    """A disk that loses a bit changes no time: noted here as checked, as a job would have before."""
    out = tmp_path / "out"
    run(lines)
    before = parts(out)
    flip_a_bit(out / "part-00003.parquet")
    checking.remember_checked(out, read_manifest(out))
    assert run(lines).already_finished
    assert [fault.split()[0] for fault in verify(out).faults] == ["part-00003.parquet"]
    run(lines)
    assert parts(out) == before


@pytest.mark.parametrize("damage", ["gone", "a line lost", "a line changed", "torn"])
def test_errors_that_are_lost_are_told_again(run: Run, lines: Path, tmp_path: Path, damage: str) -> None:
    run(lines)
    path = tmp_path / "out" / "_errors.jsonl"
    told, content = errors(tmp_path / "out"), path.read_text().splitlines(keepends=True)
    if damage == "gone":
        path.unlink()
    else:
        changed = {"a line lost": "", "a line changed": content[2].replace("empty", "full"), "torn": content[2][:-9]}
        path.write_text("".join([*content[:2], changed[damage], *content[3:]]))
    assert "_errors.jsonl does not tell" in verify(tmp_path / "out").faults[0]
    run(lines)
    assert errors(tmp_path / "out") == told
    assert not verify(tmp_path / "out").faults


def test_files_of_the_user_stay_where_they_are(run: Run, lines: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "x.tmp").mkdir(parents=True)
    with pytest.raises(OutputError, match=r"out has other files \(x\.tmp, …\)"):
        run(lines)
    (out / "x.tmp").rmdir()
    run(lines)
    own = [out / name for name in ("notes.tmp", "part-00000.parquet.tmp", ".job/x.tmp", ".hidden.tmp")]
    for path in own:
        path.write_text("the user's")
    leftovers = [out / ".part-00001.parquet.llm2vec-fast.tmp", out / ".job" / ".checked.json.llm2vec-fast.tmp"]
    for path in leftovers:
        path.write_text("half")
    (out / "part-00001.parquet").unlink()
    run(lines)
    assert [path.read_text() for path in own] == ["the user's"] * 4
    assert not any(path.exists() for path in leftovers)


def test_arrow_pandas_and_datasets_open_the_folder(run: Run, lines: Path, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    datasets = pytest.importorskip("datasets")
    import pyarrow.dataset
    import pyarrow.parquet as pq

    rows = run(lines, rows_per_shard=100).rows  # one part beside two files of JSON
    out = tmp_path / "out"
    assert pq.read_table(out).num_rows == pyarrow.dataset.dataset(out, format="parquet").count_rows() == rows
    assert len(pandas.read_parquet(out)) == rows
    assert len(datasets.load_dataset(str(out), split="train", cache_dir=str(tmp_path / "cache"))) == rows


def test_a_folder_of_an_earlier_release_is_refused_in_a_sentence(run: Run, lines: Path, tmp_path: Path) -> None:
    run(lines)
    out = tmp_path / "out"
    value = manifest(out) | {"format_version": 1}
    (out / "_manifest.json").unlink()
    (out / "manifest.json").write_text(json.dumps(value))
    for call in (lambda: run(lines), lambda: verify(out)):
        with pytest.raises(OutputError, match=r"was written by an earlier release .* use that release for it"):
            call()


def set_in(value: Any, path: str, new: Any) -> None:
    *names, last = path.split(".")
    for name in names:
        value = value[int(name) if name.isdigit() else name]
    value[last] = new


@pytest.mark.parametrize(
    ("path", "new", "message"),
    [
        ("parts.1.name", "/etc/part.parquet", "name of part 1 is '/etc/part.parquet', not 'part-00001.parquet'"),
        ("parts.1.name", "../part-00001.parquet", "name of part 1"),
        ("parts.1.name", "part-00002.parquet", "name of part 1"),
        ("parts.1.rows", -1, "rows of part 1 is -1"),
        ("parts.1.rows", "9", "rows of .* is '9', not int"),
        ("parts.1.sha256", "0", "sha256 of part 1 is '0'"),
        ("parts.1.environment", 7, "environment of part 1 is 7 of 1"),
        ("parts.1.more", 1, "has 'more', which this program does not know"),
        ("parts.1.end.row", 5, "part 2 does not begin where the one before it ends"),
        ("parts.0.first_row", 3, "part 0 does not begin"),
        (
            "settings.trust_remote_code",
            True,
            "settings of it has 'trust_remote_code', which this program",
        ),
        ("settings.keep_columns", "text", "keep_columns of settings of it is 'text'"),
        ("settings.pooling", "__class__", "pooling of settings is '__class__'"),
        ("settings.token_budget", 0, "token_budget of settings is 0"),
        ("resolved.device_map", "auto", "resolved of it has 'device_map'"),
        ("resolved.dimension", 0, "dimension of resolved is 0"),
        ("resolved.dimension", 1 << 40, "dimension of resolved is 1099511627776"),
        ("parts.1.rows", 1 << 70, "rows of an item of parts of it is 1180591620717411303424, not int"),
        ("resolved.dtype", "pickle", "dtype of resolved of it is 'pickle'"),
        ("model.path", None, "path of model is None"),
        ("model.files", [{"path": "x", "sha256": 1}], "sha256 of model is 1"),
        ("inputs.0.bytes", "many", "bytes of an item of inputs of it is 'many'"),
        ("state", "done", "state of it is 'done'"),
        ("kwargs", {}, "it has 'kwargs', which this program does not know"),
    ],
)
def test_what_a_manifest_cannot_say_is_named(
    run: Run, lines: Path, tmp_path: Path, path: str, new: Any, message: str
) -> None:
    run(lines)
    value = manifest(tmp_path / "out")
    set_in(value, path, new)
    (tmp_path / "out" / "_manifest.json").write_text(json.dumps(value))
    with pytest.raises(OutputError, match=rf"_manifest\.json is damaged \(.*{message}.*\): embed again"):
        verify(tmp_path / "out")


def test_a_line_of_the_journal_that_says_what_none_can_is_named(run: Run, lines: Path, tmp_path: Path) -> None:
    run(lines)
    part = manifest(tmp_path / "out")["parts"][1]
    (tmp_path / "out" / ".job" / "parts.jsonl").write_text(json.dumps(part | {"name": "../x.parquet"}) + "\n")
    with pytest.raises(OutputError, match=r"name of part 1 is '\.\./x\.parquet'"):
        run(lines)


def test_a_folder_whose_name_is_no_utf8_is_written_checked_mended_and_searched(
    run: Run, lines: Path, tmp_path: Path
) -> None:
    out = os.fsdecode(b"caf\xe9")
    run(lines, output=out)
    (tmp_path / out / "part-00001.parquet").unlink()
    run(lines, output=out)
    assert not verify(tmp_path / out).faults
    assert search(tmp_path / out, ["number 7"], load=lambda settings: FakeEncoder())[0]


def test_a_tilde_is_the_home_folder(run: Run, lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in --output=~/vectors, which no shell expands."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    run(lines)
    (tmp_path / "out" / "part-00001.parquet").unlink()
    settings = EmbedSettings(model=str(tmp_path / "model"), rows_per_shard=10)
    assert embed([str(lines)], Path("~/out"), settings, load=lambda settings: FakeEncoder()).rows_now == 8
    assert not verify(Path("~/out")).faults
    assert search(Path("~/out"), ["number 7"], load=lambda settings: FakeEncoder())[0]


def test_what_a_system_puts_into_an_empty_folder_is_nobodys(run: Run, lines: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "lost+found").mkdir(parents=True)
    (tmp_path / "out" / ".DS_Store").write_bytes(b"")
    assert run(lines).rows == 39


def test_a_manifest_that_nests_too_deep_is_damaged(run: Run, lines: Path, tmp_path: Path) -> None:
    run(lines)
    (tmp_path / "out" / "_manifest.json").write_text("[" * 100_000)
    with pytest.raises(OutputError, match=r"_manifest\.json is damaged"):
        verify(tmp_path / "out")


def test_verify_names_a_part_that_is_none(run: Run, lines: Path, tmp_path: Path) -> None:
    run(lines)
    report = verify(tmp_path / "out")
    assert (report.parts, report.rows, report.bad_rows, report.finished, report.faults) == (5, 39, 6, True, [])
    (tmp_path / "out" / "part-00005.parquet").write_bytes((tmp_path / "out" / "part-00004.parquet").read_bytes())
    [fault] = verify(tmp_path / "out").faults
    assert fault == "part-00005.parquet is no part of it, but a reader of the folder takes it for one"
    with pytest.raises(InputError, match=r"has no _manifest\.json: give a folder that `llm2vec-fast embed` wrote"):
        verify(tmp_path)
