"""Arguments from a file and from the command line, and what is said of wrong ones."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from transformers import TrainingArguments

from llm2vec_fast.errors import UserError
from llm2vec_fast.training.arguments import ContrastiveArguments, MntpArguments, SimcseArguments
from llm2vec_fast.training.config import own_options, read_arguments, ready_configs, write_arguments
from llm2vec_fast.training.settings.checks import require_joined
from llm2vec_fast.training.word_level import WordLevelArguments

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


def test_sharding_is_written_and_read_back(config: Path, tmp_path: Path) -> None:
    wrapped = '{"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}'
    arguments = read_arguments(MntpArguments, config, ["--fsdp", "full_shard", "--fsdp_config", wrapped])
    write_arguments(arguments, tmp_path)
    again = read_arguments(MntpArguments, tmp_path / "training_config.yaml")
    assert (again.fsdp, again.fsdp_config) == (arguments.fsdp, arguments.fsdp_config)
    assert again.fsdp_config["transformer_layer_cls_to_wrap"] == ["LlamaDecoderLayer"]


def test_tokens_of_the_hub_are_not_written(config: Path, tmp_path: Path) -> None:
    arguments = read_arguments(MntpArguments, config, ["--hub_token", "hf_secret", "--hub_model_id", "a/b"])
    write_arguments(arguments, tmp_path)
    written = (tmp_path / "training_config.yaml").read_text()
    assert "hub_model_id: a/b" in written
    assert "secret" not in written
    assert "token" not in written


OBJECT = '{"non_blocking": true, "gradient_accumulation_kwargs": {"sync_each_batch": true}}'


@pytest.mark.parametrize("given", [None, OBJECT])
def test_settings_that_are_objects_are_written_and_read_back(config: Path, tmp_path: Path, given: str | None) -> None:
    words = [] if given is None else ["--accelerator_config", given]
    arguments = read_arguments(MntpArguments, config, words)
    write_arguments(arguments, tmp_path)
    again = read_arguments(MntpArguments, tmp_path / "training_config.yaml")
    assert again.accelerator_config.to_dict() == arguments.accelerator_config.to_dict()
    assert again.accelerator_config.non_blocking is (given is not None)
    assert ("accelerator_config" in (tmp_path / "training_config.yaml").read_text()) is (given is not None)


def test_a_setting_that_cannot_be_written_is_told(config: Path, tmp_path: Path) -> None:
    arguments = read_arguments(MntpArguments, config)
    arguments.optim_args = object()
    with pytest.raises(UserError, match=r"optim_args=<object .*> cannot be written to .*training_config.yaml: give"):
        write_arguments(arguments, tmp_path)


@pytest.mark.parametrize(
    ("lines", "words", "steps"),
    [
        ("", [], 1000),
        ("", ["--num_train_epochs", "2"], -1),
        ("", ["--num-train-epochs=2"], -1),
        ("num_train_epochs: 2", [], -1),
        ("max_steps: 70", ["--num_train_epochs", "2"], -1),
        ("max_steps: 70\nnum_train_epochs: 2", [], 70),
        ("num_train_epochs: 2", ["--max_steps", "70"], 70),
        ("", ["--num_train_epochs", "2", "--max_steps", "70"], 70),
    ],
)
def test_the_length_of_training_follows_what_was_asked_for_last(
    config: Path, tmp_path: Path, lines: str, words: list[str], steps: int
) -> None:
    config.write_text(f"{config.read_text()}{lines}\n")
    arguments = read_arguments(MntpArguments, config, words)
    assert arguments.max_steps == steps
    assert arguments.num_train_epochs == (2 if "num" in lines or "num" in "".join(words) else 3)
    write_arguments(arguments, tmp_path / "out")
    assert read_arguments(MntpArguments, tmp_path / "out" / "training_config.yaml").max_steps == steps


def test_steps_as_by_default_beside_epochs_are_written_and_read_back(config: Path, tmp_path: Path) -> None:
    arguments = read_arguments(MntpArguments, config, ["--num_train_epochs", "2", "--max_steps", "1000"])
    write_arguments(arguments, tmp_path)
    assert read_arguments(MntpArguments, tmp_path / "training_config.yaml").max_steps == 1000


def test_a_ready_configuration_trains_by_the_epochs_of_the_command_line() -> None:
    options = ["--train_file", "a.txt", "--use_cpu", "True", "--num_train_epochs", "2"]
    assert read_arguments(MntpArguments, "llama-2-7b", options).max_steps == -1
    assert read_arguments(WordLevelArguments, "llama-2-7b", options).max_steps == -1


@pytest.mark.skipif(torch.accelerator.is_available(), reason="an accelerator is used where there is one")
def test_a_machine_without_accelerator_trains_on_its_cpu_and_does_not_write_that_down(tmp_path: Path) -> None:
    given = ["--train_file", "a.txt", "--model_name_or_path", "m", "--output_dir", str(tmp_path)]
    arguments = read_arguments(MntpArguments, None, given)
    assert arguments.use_cpu
    write_arguments(arguments, tmp_path)
    assert (
        not {"use_cpu", "dataloader_pin_memory"}
        & yaml.safe_load((tmp_path / "training_config.yaml").read_text()).keys()
    )
    write_arguments(read_arguments(MntpArguments, None, [*given, "--use_cpu", "true"]), tmp_path)
    assert yaml.safe_load((tmp_path / "training_config.yaml").read_text())["use_cpu"] is True


def test_processes_that_would_train_apart_are_refused(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = read_arguments(MntpArguments, config)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="2 processes were started and 1 would train together on cpu: give --use_cpu"):
        require_joined(arguments)


@pytest.mark.parametrize("wanted", ["true", "False"])
def test_sharding_is_switched_as_any_setting_is(wanted: str, config: Path) -> None:
    arguments = read_arguments(MntpArguments, config, ["--fsdp", wanted])
    assert bool(arguments.fsdp) == (wanted == "true")


@pytest.mark.parametrize("first", ["false", "true"])
def test_what_is_written_can_be_changed_in_every_setting(config: Path, tmp_path: Path, first: str) -> None:
    write_arguments(read_arguments(MntpArguments, config, ["--gradient_checkpointing", first]), tmp_path)
    written = tmp_path / "training_config.yaml"
    assert read_arguments(MntpArguments, written).gradient_checkpointing is (first == "true")
    for other in (False, True):
        again = read_arguments(MntpArguments, written, ["--gradient_checkpointing", str(other)])
        assert again.gradient_checkpointing is other


KINDS = {kind.STAGE: kind for kind in (MntpArguments, SimcseArguments, ContrastiveArguments)}
MODELS = ["llama-2-7b", "llama-3-8b", "mistral-7b", "sheared-llama-1.3b", "smollm2-135m"]


@pytest.mark.parametrize("kind", [*KINDS.values(), WordLevelArguments], ids=[*KINDS, WordLevelArguments.STAGE])
def test_ready_configurations_and_defaults_cause_no_warning(
    kind: type[MntpArguments], caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    """Whoever changed nothing has nothing to be told."""
    rest = ["--model_name_or_path", "m", "--train_file", "a.txt", "--output_dir", "out", "--use_cpu", "True"]
    for config in (None, *ready_configs(kind.STAGE)):
        read_arguments(kind, config, rest)
    assert not caplog.messages
    assert not [str(each.message) for each in recwarn]


@pytest.mark.parametrize("stage", KINDS)
def test_ready_configurations_are_valid_and_follow_each_other(stage: str) -> None:
    assert list(ready_configs(stage)) == MODELS
    outputs = {f"output/{stage}/{name}" for stage in KINDS for name in MODELS}
    for name in MODELS:
        arguments = read_arguments(KINDS[stage], name, ["--train_file", "a.txt", "--use_cpu", "True"])
        assert arguments.output_dir == f"output/{stage}/{name}"
        assert set(arguments.peft_model_name_or_path) <= outputs
        assert bool(arguments.peft_model_name_or_path) == (stage != "mntp")


@pytest.mark.parametrize("name", MODELS)
def test_ready_word_level_configurations_label_by_the_output_before_on_the_masked_models_adapter(name: str) -> None:
    assert list(ready_configs("word-level")) == MODELS
    arguments = read_arguments(WordLevelArguments, name, ["--train_file", "a.txt", "--use_cpu", "True"])
    before = read_arguments(MntpArguments, name, ["--train_file", "a.txt", "--use_cpu", "True"])
    assert arguments.retroactive_labels == "next_token"
    assert arguments.model_name_or_path == before.model_name_or_path
    assert arguments.peft_model_name_or_path == before.output_dir


@pytest.mark.parametrize("name", MODELS)
def test_ready_configurations_have_the_papers_rank_or_save_an_adapter_of_it(name: str) -> None:
    options = ["--train_file", "a.txt", "--use_cpu", "True"]
    stages = [read_arguments(kind, name, options) for kind in KINDS.values()]
    ranks = [stage.lora_r for stage in stages]
    assert ranks == [16, 16, 16] or (stages[-1].saved_rank or sum(ranks)) == 16


@pytest.mark.parametrize(
    ("stage", "name", "expected"),
    [
        ("simcse", "llama-2-7b", {"learning_rate": 3e-5, "scale": 20, "attention_dropout": 0.3, "max_seq_length": 128}),
        ("contrastive", "mistral-7b", {"learning_rate": 2e-4, "scale": 50, "max_steps": 1000}),
    ],
)
def test_the_papers_settings(stage: str, name: str, expected: dict[str, object]) -> None:
    """In the ready configurations, and where no configuration is given."""
    needed = ["--train_file", "a.txt", "--use_cpu", "True", "--model_name_or_path", "m", "--output_dir", "out"]
    for config in (name, None):
        arguments = read_arguments(KINDS[stage], config, needed)
        assert {key: getattr(arguments, key) for key in expected} == expected
        assert arguments.get_warmup_steps(arguments.max_steps) == (300 if stage == "contrastive" else 0)


def test_one_value_or_several_is_a_list(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(NEEDED + "peft_model_name_or_path: one\nquery_instruction: 'find it:'\nmatryoshka_dims: [8, 16]\n")
    arguments = read_arguments(ContrastiveArguments, path, ["--document_instruction", "a b", "--negative_columns", "n"])
    assert arguments.peft_model_name_or_path == ["one"]
    assert arguments.query_instruction == ["find it:"]
    assert arguments.document_instruction == ["a b"]
    assert arguments.negative_columns == ["n"]
    assert arguments.matryoshka_dims == [8, 16]


def test_values_of_a_file_are_read_as_on_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        NEEDED + "save_strategy: no\ntext_column: 3\nline_by_line: 'yes'\nlearning_rate: 1\n"
        "lora_target_modules: q_proj\nlora_alpha:\ninclude_for_metrics: []\n"
        "lr_scheduler_type: cosine\nlr_scheduler_kwargs: {num_cycles: 2}\n"
    )
    arguments = read_arguments(MntpArguments, path)
    assert arguments.save_strategy == "no"
    assert arguments.text_column == "3"
    assert arguments.line_by_line is True
    assert isinstance(arguments.learning_rate, float)
    assert arguments.lora_target_modules == ["q_proj"]
    assert arguments.lora_alpha is None
    assert arguments.lr_scheduler_kwargs == {"num_cycles": 2}
    assert arguments.include_for_metrics == []


def assert_refused(kind: type[TrainingArguments], folder: Path, line: str, message: str) -> None:
    """A configuration with this line, in place of one with the same key, is, in one sentence that says so."""
    path = folder / "config.yaml"
    kept = [other for other in NEEDED.splitlines() if other.split(":")[0] != line.split(":")[0]]
    path.write_text("\n".join([*kept, line]) + "\n")
    with pytest.raises(UserError, match=message) as caught:
        read_arguments(kind, path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("max_seq_length: 0", "max_seq_length=0 is not positive"),
        ("token_budget: 0", "token_budget=0 is not positive"),
        ("model_dtype: half", "model_dtype=half is unknown"),
        ("retroactive_labels: both", "retroactive_labels=both is unknown: choose one of same_token, next_token"),
        ("classifier_dropout: 1", "classifier_dropout=1.0 is not a share"),
        ("per_device_train_batch_size: 0", "per_device_train_batch_size=0 is not positive"),
        ("train_file: ''", "train_file is not given"),
        ("peft_model_name_or_path: [a, b]", "has peft_model_name_or_path with an invalid str value"),
        ("word_colum: 1", "has an unknown key 'word_colum': did you mean word_column?"),
    ],
)
def test_wrong_word_level_settings_are_refused_in_one_sentence(tmp_path: Path, line: str, message: str) -> None:
    assert_refused(WordLevelArguments, tmp_path, line, message)


def test_an_adapter_of_a_configuration_can_be_left_out() -> None:
    options = ["--train_file", "a.txt", "--use_cpu", "True", "--peft_model_name_or_path", ""]
    assert read_arguments(SimcseArguments, "llama-2-7b", options).peft_model_name_or_path == []


def test_options_are_shown_as_a_configuration_has_them() -> None:
    shown = {name: value for name, value, _ in own_options(MntpArguments, "smollm2-135m")}
    assert (shown["line_by_line"], shown["max_steps"], shown["warmup_steps"]) == ("True", "1200", "20")
    assert shown["output_dir"] == "output/mntp/smollm2-135m"
    assert {"output_dir", "learning_rate"} <= {name for name, *_ in own_options(MntpArguments)}


@pytest.mark.parametrize("kind", [*KINDS.values(), WordLevelArguments], ids=[*KINDS, WordLevelArguments.STAGE])
def test_every_setting_says_what_it_is(kind: type[MntpArguments]) -> None:
    options = own_options(kind)
    own = {item.name for item in fields(kind)} - {item.name for item in fields(TrainingArguments)}
    assert len(own) > 10
    assert own <= {name for name, _, _ in options}
    assert all(len(text) > 10 for _, _, text in options)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("query_colum: q", "has an unknown key 'query_colum': did you mean query_column?"),
        ("scale: -1", "scale=-1.* is not a positive number"),
        ("pooling_mode: median", "pooling_mode=median is unknown: choose one of mean, weighted_mean"),
        ("attention_dropout: 1", "attention_dropout=1.* is not a share"),
        ("token_budget: 0", "token_budget=0 is not positive"),
        ("matryoshka_dims: [0]", r"matryoshka_dims=\[0\] has a number below 1"),
        ("matryoshka_weights: [1]", "matryoshka_weights has 1 numbers and matryoshka_dims 0"),
        ("matryoshka_dims: [8]\nmatryoshka_weights: [-1]", r"matryoshka_weights=\[-1.0\] has one that is not positive"),
        (
            "matryoshka_dims: [8]\nmatryoshka_weights: [.nan]",
            r"matryoshka_weights=\[nan\] has one that is not positive",
        ),
        ("matryoshka_dims: [8.5]", r"matryoshka_dims with an invalid list\[int\] value: \[8.5\]"),
        ("false_negative_margin: .nan", "false_negative_margin=nan is not a number"),
        ("gradient_accumulation_steps: 0", "gradient_accumulation_steps=0 is not positive"),
        ("scale: [1]", r"has scale with an invalid float value: \[1\]"),
        ("query_instruction:", "has query_instruction with an invalid .* value: None"),
        ("negatives: -1", "negatives=-1 is negative"),
        ("continue_adapter: true", "continue_adapter=True needs an adapter: give peft_model_name_or_path"),
    ],
)
def test_wrong_contrastive_settings_are_refused_in_one_sentence(tmp_path: Path, line: str, message: str) -> None:
    assert_refused(ContrastiveArguments, tmp_path, line, message)


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
        ("lora_r: 2.5", "has lora_r with an invalid int value: 2.5"),
        ("lora_r:", "has lora_r with an invalid int value: None"),
        ("lora_alpha: 0", "lora_alpha=0 is not positive"),
        ("lora_target_modules: []", "lora_target_modules is empty"),
        ("model_dtype: float17", "model_dtype=float17 is unknown: choose one of auto, float32"),
        ("per_device_train_batch_size: 0", "per_device_train_batch_size=0 is not positive"),
        ("per_device_eval_batch_size: -1", "per_device_eval_batch_size=-1 is not positive"),
        ("max_steps: 0", "max_steps=0 is not positive"),
        ("max_steps: -1\nnum_train_epochs: 0", "num_train_epochs=0.0 is not positive"),
        ("learning_rate: -1", "learning_rate=-1.0 is not a rate"),
        ("seed: -1", "seed=-1 is not a seed"),
        ("train_file: {a: b}", "has train_file with an invalid .* value: {'a': 'b'}"),
        ("line_by_line: perhaps", "has line_by_line with an invalid bool value: 'perhaps'"),
        ("optim: sgdx", "sgdx is not a valid OptimizerNames"),
        ("warmup_steps: -4", "Got warmup_steps = -4"),
        ("3: 4", "has an unknown key '3'"),
        ("a: [", "is not valid YAML"),
    ],
)
def test_wrong_settings_are_refused_in_one_sentence(tmp_path: Path, line: str, message: str) -> None:
    assert_refused(MntpArguments, tmp_path, line, message)


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


def test_a_misspelt_key_is_told_before_the_one_that_is_then_missing() -> None:
    with pytest.raises(UserError, match=r"unknown key 'train_fil': did you mean train_file\?"):
        read_arguments(MntpArguments, None, ["--train-fil", "texts.txt"])
    assert not read_arguments(
        MntpArguments, None,
        ["--model-name-or-path=m", "--train_file", "t", "--output-dir=o", "--no_dataloader_pin_memory", "--lora-r=0"],
    ).lora_r  # fmt: skip


def test_missing_files_and_settings_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="model_name_or_path is not given"):
        read_arguments(MntpArguments, None, ["--train_file", "a.txt"])
    with pytest.raises(UserError, match="train_file is not given"):
        read_arguments(MntpArguments, None, ["--model_name_or_path", "m"])
    with pytest.raises(UserError, match="output_dir is not given"):
        read_arguments(MntpArguments, None, ["--model_name_or_path", "m", "--train_file", "a.txt"])
    with pytest.raises(UserError, match=r"the configuration .*none.yaml cannot be read: No such file"):
        read_arguments(MntpArguments, tmp_path / "none.yaml")
    with pytest.raises(UserError, match="there is no configuration 'llama-9': give a YAML file or one of llama-2-7b"):
        read_arguments(MntpArguments, "llama-9")
