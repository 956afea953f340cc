"""A folder changes whole or not at all, whenever the process ends, and is on the disk before it takes its place."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from pathlib import Path

import pytest
from reference_data import FOLDER, TEXTS

from llm2vec_fast import LLM2Vec
from llm2vec_fast.errors import ModelLoadError, OutputError
from llm2vec_fast.saving import folder as module
from llm2vec_fast.saving import written_beside

OLD = {"config.json": "old", "model.safetensors": "old", "added_tokens.json": "old"}
NEW = {"config.json": "new", "adapter_config.json": "new", "adapter_model.safetensors": "new"}
MINE = {"notes.txt": "mine", "runs/1/log.txt": "mine", "embeddings.safetensors": "mine"}
STALE = ("config.json", "model*.safetensors", "added_tokens.json", "adapter_*")
ENDED = 9


def fill(folder: Path, *contents: dict[str, str]) -> Path:
    for content in contents:
        for name, text in content.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
    return folder


def held(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def replace(target: Path) -> None:
    with written_beside(target, STALE) as folder:
        fill(folder, NEW)


def no_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_swapped", lambda one, other: False)


def no_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)


def no_rename(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a mounted volume."""
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "target")


def late_no_rename(monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(one: Path, other: Path) -> bool:
        raise OSError(errno.EBUSY, "busy")

    monkeypatch.setattr(module, "_swapped", busy)


SYSTEMS = [lambda monkeypatch: None, no_exchange, no_links, no_rename, late_no_rename]


@pytest.mark.parametrize("system", SYSTEMS, ids=["usual", "no-exchange", "no-links", "mounted", "busy"])
def test_a_folder_is_replaced_and_what_is_the_users_stays(tmp_path, monkeypatch, system):
    target = fill(tmp_path / "target", OLD, MINE)
    (target / "link").symlink_to("notes.txt")
    mode = target.stat().st_mode
    system(monkeypatch)
    replace(target)
    assert held(target) == {**NEW, **MINE, "link": "mine"}
    assert (target / "link").is_symlink()
    assert target.stat().st_mode == mode
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_link_to_a_folder_stays_one(tmp_path):
    fill(tmp_path / "real", OLD, MINE)
    (tmp_path / "link").symlink_to("real")
    replace(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert held(tmp_path / "real") == {**NEW, **MINE}


@pytest.mark.parametrize("given", [".", "../target", "..", "new"])
def test_a_folder_that_one_works_in_stays_in_its_place(tmp_path, monkeypatch, given):
    fill(tmp_path / "target" / "inside", OLD)
    fill(tmp_path / "target", OLD, MINE)
    monkeypatch.chdir(tmp_path / "target" / ("inside" if given == ".." else ""))
    place = os.stat(given).st_ino if given != "new" else None
    replace(Path(given))
    assert NEW.items() <= held(Path(given)).items()
    assert place in (None, os.stat(given).st_ino)
    assert Path.cwd().exists()
    assert (tmp_path / "target" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["model[1]", "a b", "*", "-x", "ü"])
def test_any_name_will_do(tmp_path, monkeypatch, name):
    no_exchange(monkeypatch)
    fill(tmp_path / f".{name}.abc.aside", OLD, MINE)  # as a save that was cut off leaves it
    replace(tmp_path / name)
    assert held(tmp_path / name) == {**NEW, **MINE}
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "target").write_text("a file")
    with pytest.raises(OutputError, match="target is a file: give a folder"):
        replace(tmp_path / "target")
    assert (tmp_path / "target").read_text() == "a file"


def test_what_comes_while_it_is_written_stays(tmp_path, monkeypatch):
    target = fill(tmp_path / "target", OLD)
    real = module._swapped

    def slow(one: Path, other: Path) -> bool:
        fill(other, {"late.txt": "mine"})
        return real(one, other)

    monkeypatch.setattr(module, "_swapped", slow)
    replace(target)
    assert held(target) == {**NEW, "late.txt": "mine"}


CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "shutil.copyfile"}


def ended_at(change: int, target: Path, before: object, action: object) -> int:
    """Run ``action`` in a child process that ends as it is about to make its n-th change; its exit code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    seen = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal seen
        writes = event == "open" and isinstance(arguments[1], str) and any(mark in arguments[1] for mark in "wax+")
        if (event in CHANGES or writes) and str(arguments[0]).startswith(str(target.parent)):
            seen += 1
            if seen == change:
                os._exit(ENDED)

    try:
        before()  # type: ignore[operator]
        sys.addaudithook(hook)
        action(target)  # type: ignore[operator]
    except BaseException:
        os._exit(3)
    os._exit(0)


def moments(tmp_path: Path, action: object, before: object = lambda: None):
    """The folder after a process was ended at each of its changes, last of all after none."""
    for change in range(1, 200):
        place = tmp_path / str(change)
        target = fill(place / "target", OLD, MINE)
        code = ended_at(change, target, before, action)
        assert code in (0, ENDED)
        yield target
        shutil.rmtree(place)
        if code == 0:
            assert change > 5
            return
    raise AssertionError("it did not come to an end")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="ends processes by fork")
def test_whenever_the_process_ends_the_folder_is_the_old_or_the_new_one(tmp_path):
    seen = []
    for target in moments(tmp_path, replace):
        found = held(target)
        assert found in ({**OLD, **MINE}, {**NEW, **MINE})
        seen.append(found["config.json"])
    assert seen[0] == "old"
    assert seen[-1] == "new"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="ends processes by fork")
def test_without_an_exchange_a_folder_set_aside_is_put_back(tmp_path):
    """Between two renames there is no folder: what loads says where it is, and the next save puts it back."""
    monkeypatch, gone = pytest.MonkeyPatch(), 0
    for target in moments(tmp_path, replace, lambda: no_exchange(monkeypatch)):
        if target.exists():
            assert held(target) in ({**OLD, **MINE}, {**NEW, **MINE})
            continue
        gone += 1
        with pytest.raises(
            ModelLoadError, match=r"a save into it was cut off, and .*\.aside holds it as it was before"
        ):
            LLM2Vec.from_pretrained(target)
        with pytest.raises(ZeroDivisionError), written_beside(target):
            raise ZeroDivisionError
        assert held(target) == {**OLD, **MINE}
    assert gone == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="ends processes by fork")
def test_a_folder_that_cannot_be_renamed_does_not_load_until_it_is_whole(tmp_path):
    """Where neither exchange nor rename is possible: old, or new, or without the files that loading asks for first."""
    monkeypatch, between = pytest.MonkeyPatch(), 0
    for target in moments(tmp_path, replace, lambda: no_rename(monkeypatch)):
        found = {name: text for name, text in held(target).items() if ".partial" not in name}
        assert MINE.items() <= found.items()
        if found not in ({**OLD, **MINE}, {**NEW, **MINE}):
            between += 1
            read_first = {"config.json", "adapter_config.json"}
            if read_first & set(found):
                assert {name: text for name, text in NEW.items() if name not in read_first}.items() <= found.items()
                assert "old" not in found.values()
            whole = [path for path in target.iterdir() if path.name.endswith(".partial")]
            assert any(NEW.items() <= held(path).items() for path in whole)
    assert between


def test_files_and_names_are_on_the_disk_before_the_folder_takes_its_place(tmp_path, monkeypatch):
    order: list[str] = []
    real_sync, real_swap = os.fsync, module._swapped

    def sync(descriptor: int) -> None:
        order.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name if sys.platform == "linux" else "?")
        real_sync(descriptor)

    def swap(one: Path, other: Path) -> bool:
        order.append("exchanged")
        return real_swap(one, other)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(module, "_swapped", swap)
    target = fill(tmp_path / "target", OLD)
    replace(target)
    first = order[: order.index("exchanged")]
    if sys.platform == "linux":
        assert set(NEW) <= set(first)
        assert any(name.endswith(".partial") for name in first)  # the folder itself: its names
    assert len(order) > order.index("exchanged") + 1  # and that it took its place


def test_an_encoder_saved_over_another_leaves_nothing_of_it(tmp_path):
    """Settings, vocabulary and weights of the folder before would change what is loaded."""

    def load(*sources: Path, **options: object) -> LLM2Vec:
        return LLM2Vec.from_pretrained(*sources, dtype="float32", device="cpu", **options)

    target = tmp_path / "out"
    load(FOLDER / "mistral", pooling_mode="last_token", max_length=9).save(target)
    for name in ("added_tokens.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"):
        (target / name).write_text("{}")
    encoder = load(FOLDER / "llama")
    encoder.save(target, save_config=False)
    assert (load(target).encode(TEXTS) == encoder.encode(TEXTS)).all()
    adapted = load(FOLDER / "llama", FOLDER / "llama-lora")
    adapted.save(target)
    assert not (target / "config.json").exists()
    assert float((load(target).encode(TEXTS) - adapted.encode(TEXTS)).abs().max()) < 1e-4
