"""Arguments from a file and from the command line, and what is said of wrong ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm2vec_fast.errors import UserError
from llm2vec_fast.training.arguments import MntpArguments
from llm2vec_fast.training.config import read_arguments, ready_configs, write_arguments

NEEDED = "model_name_or_path: model\ntrain_file: [a.txt, b.txt]\noutput_dir: out\nuse_cpu: true\n"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(NEEDED + "learning_rate: 3e-5\nmlm_probability: 0.3\n")
    return path


def test_the_command_line_wins_over_the_file(config: Path) -> None:
    arguments = read_arguments(MntpArguments, config, ["--mlm_probability", "0.4", "--train_file", "c.txt"])
    assert arguments.learning_rate == 3e-5
    assert arguments.mlm_probability == 0.4
    assert arguments.train_file == ["c.txt"]
    assert arguments.per_device_train_batch_size == 32


def test_what_is_written_beside_the_output_reads_back_the_same(config: Path, tmp_path: Path) -> None:
    arguments = read_arguments(MntpArguments, config, ["--lora_r", "8"])
    write_arguments(arguments, tmp_path / "out")
    again = read_arguments(MntpArguments, tmp_path / "out" / "training_config.yaml")
    assert again.to_dict() == arguments.to_dict()


@pytest.mark.parametrize("name", ready_configs("mntp"))
def test_ready_configurations_are_valid(name: str) -> None:
    arguments = read_arguments(MntpArguments, name, ["--train_file", "a.txt", "--use_cpu", "True"])
    assert arguments.lora_r == 16
    assert arguments.output_dir.endswith(name)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("learning_rte: 1", r"the file .* has an unknown key 'learning_rte': did you mean learning_rate\?"),
        ("zzzzz: 1", "has an unknown key 'zzzzz': llm2vec-fast train STAGE --options tells what there is"),
        ("mlm_probability: 1.5", "mlm_probability=1.5 is not a share"),
        ("mlm_probability: 0.0", "mlm_probability=0 hides no token"),
        ("mask_token_type: blnk", "mask_token_type=blnk is unknown: choose one of blank, eos, mask"),
        ("data_collator_type: bert", "data_collator_type=bert is unknown: choose one of default, all_mask"),
        ("learning_rate: fast", "invalid float value: 'fast'"),
        ("max_seq_length: 1", "max_seq_length=1 leaves nothing to predict"),
        ("lora_r: -1", "lora_r=-1 is negative"),
        ("a: [", "is not valid YAML"),
    ],
)
def test_wrong_settings_are_refused_in_one_sentence(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(NEEDED + line + "\n")
    with pytest.raises(UserError, match=message) as caught:
        read_arguments(MntpArguments, path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lora_rr", "3"], r"the command line has an unknown key 'lora_rr': did you mean lora_r\?"),
        (["--mlm_probability=0"], "mlm_probability=0 hides no token"),
        (["stray"], "'stray' on the command line belongs to no option"),
    ],
)
def test_wrong_options_are_refused(config: Path, options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_arguments(MntpArguments, config, options)


def test_missing_files_and_settings_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="model_name_or_path is not given"):
        read_arguments(MntpArguments, None, ["--train_file", "a.txt"])
    with pytest.raises(UserError, match="train_file is not given"):
        read_arguments(MntpArguments, None, ["--model_name_or_path", "m"])
    with pytest.raises(UserError, match=r"the configuration .*none.yaml cannot be read: No such file"):
        read_arguments(MntpArguments, tmp_path / "none.yaml")
    with pytest.raises(UserError, match="there is no configuration 'llama-9': give a YAML file or one of llama-2-7b"):
        read_arguments(MntpArguments, "llama-9")
