"""Checkpoints that lost a part of what a run goes on from: passed over, or refused by the name of the file."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from reference_data import FOLDER
from safetensors.torch import load_file

from llm2vec_fast.errors import UserError
from llm2vec_fast.training import SimcseArguments, train_simcse
from llm2vec_fast.training import checkpoints as module
from llm2vec_fast.training.checkpoints import CONTENTS, complete, damage_of, lack_of, last_checkpoint
from llm2vec_fast.training.resuming import checkpoint_to_resume

Options = Callable[..., SimcseArguments]
STEPS = 6


def options(folder: Path, **changes: object) -> SimcseArguments:
    return SimcseArguments(
        **{
            "model_name_or_path": str(FOLDER / "llama"), "train_file": [str(folder.parent / "texts.txt")],
            "output_dir": str(folder), "max_seq_length": 24, "max_steps": STEPS, "per_device_train_batch_size": 8,
            "learning_rate": 1e-2, "logging_steps": 1, "save_steps": 2, "model_dtype": "float32", "use_cpu": True,
            "learn_scale": True, "disable_tqdm": True, "report_to": "none", **changes,
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run that nothing interrupted, with checkpoints of steps 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    (folder.parent / "texts.txt").write_text("".join(f"text {i % 7} of {i % 5} about {i}\n" for i in range(40)))
    train_simcse(options(folder))
    return folder


@pytest.fixture
def cut(whole: Path, tmp_path: Path) -> Path:
    """What it left when it was killed after step 4."""
    folder = tmp_path / "out"
    for step in (2, 4):
        shutil.copytree(whole / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    shutil.copy(whole / "run.json", folder)
    shutil.copy(whole.parent / "texts.txt", tmp_path)
    return folder


def lose(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


FILES = (
    "adapter_model.safetensors", "adapter_config.json", "optimizer.pt", "scheduler.pt", "rng_state.pth",
    "scale.safetensors", "trainer_state.json", "training_args.bin",
)  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [lose, truncate, flip])
def test_a_checkpoint_with_a_damaged_file_is_passed_over_and_refused_by_name(
    name: str, damage: Callable[[Path], None], cut: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damage(cut / "checkpoint-4" / name)
    with pytest.raises(UserError, match=rf"resume_from_checkpoint=.*checkpoint-4 is no whole checkpoint, .*{name}"):
        checkpoint_to_resume(options(cut, resume_from_checkpoint=str(cut / "checkpoint-4")))
    assert (cut / "checkpoint-4").is_dir()
    assert checkpoint_to_resume(options(cut)) == str(cut / "checkpoint-2")
    assert "checkpoint-4 is passed over, " in caplog.text
    assert name in caplog.text
    assert sorted(path.name for path in cut.glob("*checkpoint*")) == ["checkpoint-2", "passed-over-1-checkpoint-4"]


def test_a_run_whose_last_checkpoint_lost_its_optimizer_comes_to_the_same_weights(cut: Path, whole: Path) -> None:
    lose(cut / "checkpoint-4" / "optimizer.pt")
    train_simcse(options(cut))
    for name in ("adapter_model.safetensors", "checkpoint-6/scale.safetensors"):
        expected, found = load_file(whole / name), load_file(cut / name)
        assert all(torch.equal(found[key], x) for key, x in expected.items())


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.safetensors"])
def test_a_checkpoint_of_another_program_is_looked_at_by_what_its_files_are(name: str, cut: Path) -> None:
    """As those of transformers' own Trainer: they list no contents."""
    checkpoint = cut / "checkpoint-4"
    (checkpoint / "contents.json").unlink()
    assert damage_of(checkpoint) is None
    assert lack_of(checkpoint) is None
    truncate(checkpoint / name)
    assert f"{name} cannot be read" in damage_of(checkpoint)
    lose(checkpoint / name)
    assert "has no" in (damage_of(checkpoint) or lack_of(checkpoint))
    assert checkpoint_to_resume(options(cut)) == str(cut / "checkpoint-2")


def test_flipped_bits_in_an_optimizer_that_no_list_tells_of_are_found(cut: Path) -> None:
    (cut / "checkpoint-4" / "contents.json").unlink()
    flip(cut / "checkpoint-4" / "optimizer.pt")
    assert checkpoint_to_resume(options(cut)) == str(cut / "checkpoint-2")


def test_where_no_checkpoint_is_whole_nothing_is_begun_over_them(cut: Path) -> None:
    for step in (2, 4):
        lose(cut / f"checkpoint-{step}" / "scheduler.pt")
    before = {path: path.stat().st_mtime_ns for path in cut.rglob("*")}
    with pytest.raises(
        UserError, match=r"none of them \(checkpoint-4: scheduler.pt is missing; checkpoint-2: scheduler.pt is missing"
    ):
        checkpoint_to_resume(options(cut))
    assert {path: path.stat().st_mtime_ns for path in cut.rglob("*")} == before


def test_a_checkpoint_that_was_cut_short_is_removed_and_training_begins(
    cut: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(cut / "checkpoint-2")
    for name in ("trainer_state.json", "contents.json"):  # what is written last
        lose(cut / "checkpoint-4" / name)
    assert checkpoint_to_resume(options(cut)) is None
    assert not (cut / "checkpoint-4").exists()
    assert "it has no trainer_state.json; it is now removed" in caplog.text


def test_checkpoints_of_weights_alone_are_told_at_the_start_and_not_gone_on_from(
    whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copy(whole.parent / "texts.txt", tmp_path)
    few = {"max_steps": 2, "save_only_model": True}
    train_simcse(options(tmp_path / "out", **few))
    assert "save_only_model=True saves weights alone: no checkpoint of this run can be gone on from" in caplog.text
    again = train_simcse(options(tmp_path / "out", **few))
    assert again.global_step == 2  # weights are all that a finished run needs
    for more in ({"save_only_model": True}, {}):
        with pytest.raises(
            UserError,
            match=r"go on from none of them \(checkpoint-2: it holds weights alone, as save_only_model=True leaves it\)"
            ": remove them to begin anew, or put one last in peft_model_name_or_path, with continue_adapter=True",
        ):
            checkpoint_to_resume(options(tmp_path / "out", **more))


def test_the_limit_of_checkpoints_never_takes_the_whole_ones(cut: Path) -> None:
    """transformers keeps the one that was changed last: by the clock of the machine that wrote it."""
    lose(cut / "checkpoint-4" / "rng_state.pth")
    (cut / "checkpoint-4").rename(cut / "checkpoint-40")
    os.utime(cut / "checkpoint-40", (2**31 - 1, 2**31 - 1))
    train_simcse(options(cut, save_total_limit=1, max_steps=5, save_steps=3))
    assert last_checkpoint(cut) == str(cut / "checkpoint-5")


def test_going_back_to_an_earlier_checkpoint_leaves_no_later_one_to_be_taken_for_its_own(
    cut: Path, caplog: pytest.LogCaptureFixture
) -> None:
    named = options(cut, resume_from_checkpoint=str(cut / "checkpoint-2"), seed=7)
    for number in (1, 2):
        assert checkpoint_to_resume(named) == str(cut / "checkpoint-2")
        assert damage_of(cut / f"passed-over-{number}-checkpoint-4") is None
        shutil.copytree(cut / "checkpoint-2", cut / "checkpoint-4")
    assert "it is later than" in caplog.text


def test_a_checkpoint_of_other_processes_is_taken_and_what_changes_is_said(
    cut: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = cut / "checkpoint-4"
    state, write = (checkpoint / "rng_state.pth"), (checkpoint / "trainer_state.json").read_text()
    shutil.copy(state, checkpoint / "rng_state_1.pth")
    state.rename(checkpoint / "rng_state_0.pth")
    complete(checkpoint, lambda path: Path(path).write_text(write))
    assert checkpoint_to_resume(options(cut)) == str(checkpoint)
    assert "2 processes wrote" in caplog.text
    assert "and 1 go on" in caplog.text
    assert "drawn at random" in caplog.text


@pytest.mark.parametrize(
    "shards",
    [
        ("global_step2/zero_pp_rank_0_mp_rank_00_optim_states.pt", "global_step2/mp_rank_00_model_states.pt", "latest"),
        ("pytorch_model_fsdp_0/__0_0.distcp", "pytorch_model_fsdp_0/.metadata", "optimizer_0/__0_0.distcp"),
        ("pytorch_model_fsdp.bin", "optimizer.bin"),
    ],
    ids=["deepspeed", "fsdp-sharded", "fsdp-full"],
)
def test_each_shard_of_a_checkpoint_counts(shards: tuple[str, ...], tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-2"
    for name in (*shards, "rng_state_0.pth", *([] if "latest" in shards else ["scheduler.pt"])):
        (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
        (checkpoint / name).write_bytes(b"some bytes")
    complete(checkpoint, lambda path: Path(path).write_text('{"global_step": 2}'))
    assert last_checkpoint(tmp_path) == str(checkpoint)
    for name in shards:
        content = (checkpoint / name).read_bytes()
        flip(checkpoint / name)
        assert damage_of(checkpoint) == f"{name} is no longer what was written"
        (checkpoint / name).unlink()
        assert last_checkpoint(tmp_path) is None
        (checkpoint / name).write_bytes(content)
    assert damage_of(checkpoint) is None


def test_power_that_fails_while_a_checkpoint_is_written_leaves_it_whole_or_without_state(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is not on the disk yet is lost; the state is renamed into its place when all else is."""

    class PowerCutError(Exception):
        pass

    on_disk: set[str] = set()

    def sync(path: Path) -> None:
        if len(on_disk) == last:
            raise PowerCutError
        on_disk.add(path.name)

    monkeypatch.setattr(module, "sync_file", sync)
    files = {path.name for path in (whole / "checkpoint-2").iterdir()} - {"README.md"}
    for last in range(len(files) + 1):
        folder = tmp_path / str(last) / "checkpoint-2"
        shutil.copytree(whole / "checkpoint-2", folder)
        state = (folder / "trainer_state.json").read_text()
        (folder / "trainer_state.json").unlink()
        on_disk.clear()
        try:
            complete(folder, lambda path, state=state: Path(path).write_text(state))
        except PowerCutError:
            assert last < len(files)
            assert not (folder / "trainer_state.json").exists()
            continue
        assert last == len(files)
        assert on_disk == files - {"trainer_state.json"} | {".trainer_state.json"}
        assert damage_of(folder) is None


def test_the_step_that_is_loaded_at_the_end_is_looked_at_too(whole: Path, cut: Path) -> None:
    best = {"load_best_model_at_end": True, "validation_file": [str(cut.parent / "texts.txt")]}
    best |= {"eval_strategy": "steps", "eval_steps": 2}
    for step in (2, 4):
        path = cut / f"checkpoint-{step}" / "trainer_state.json"
        state = json.loads(path.read_text()) | {"best_model_checkpoint": str(cut / "checkpoint-2")}
        complete(path.parent, lambda name, state=state: Path(name).write_text(json.dumps(state)))
    assert checkpoint_to_resume(options(cut, **best)) == str(cut / "checkpoint-4")
    shutil.rmtree(cut / "checkpoint-2")
    with pytest.raises(
        UserError, match=r"its best checkpoint .*checkpoint-2 cannot be loaded at the end \(there is no"
    ):
        checkpoint_to_resume(options(cut, **best))
    assert checkpoint_to_resume(options(cut)) == str(cut / "checkpoint-4")


def test_texts_that_were_edited_to_the_same_size_are_another_run_and_copied_ones_are_not(cut: Path) -> None:
    texts = cut.parent / "texts.txt"
    os.utime(texts, (1, 1))
    assert checkpoint_to_resume(options(cut)) == str(cut / "checkpoint-4")
    before = texts.stat()
    flip(texts)
    os.utime(texts, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(UserError, match=r"other settings \(train_file \['texts.txt of .* SHA-256 \w+'\] -> \['texts"):
        checkpoint_to_resume(options(cut))


def test_a_model_that_was_trained_anew_in_its_place_is_another_run(cut: Path) -> None:
    model = cut.parent / "model"
    shutil.copytree(FOLDER / "llama", model)
    some = {"model_name_or_path": str(model), "resume_from_checkpoint": str(cut / "checkpoint-4")}
    checkpoint_to_resume(options(cut, **some))
    shutil.copystat(FOLDER, model)
    assert checkpoint_to_resume(options(cut, model_name_or_path=str(model))) == str(cut / "checkpoint-4")
    flip(model / "model.safetensors")
    with pytest.raises(UserError, match=r"\(model_name_or_path .*model with samples of SHA-256 \w+ -> .*model with"):
        checkpoint_to_resume(options(cut, model_name_or_path=str(model)))


def test_a_learned_scale_is_not_begun_anew_where_its_file_is_lost(cut: Path) -> None:
    """As checkpoints have none of a run without learn_scale, or of an older version's without a list of their files."""
    checkpoint = cut / "checkpoint-4"
    (checkpoint / CONTENTS).unlink()
    (checkpoint / "scale.safetensors").unlink()
    with pytest.raises(UserError, match=r"checkpoint-4 has no scale.safetensors, and learn_scale=True goes on from"):
        train_simcse(options(cut))
