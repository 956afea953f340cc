"""A configuration file says what a person reads in it, or is refused with the line."""

from __future__ import annotations

import copy
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest
import yaml

from llm2vec_fast.errors import UserError
from llm2vec_fast.training.arguments import ContrastiveArguments, MntpArguments, SimcseArguments, StageArguments
from llm2vec_fast.training.config import read_arguments, write_arguments
from llm2vec_fast.training.word_level import WordLevelArguments
from llm2vec_fast.training.yaml_file import read_yaml, written

NEEDED = b"model_name_or_path: model\ntrain_file: [a.txt, b.txt]\noutput_dir: out\nuse_cpu: true\n"


def read(folder: Path, lines: str | bytes) -> MntpArguments:
    path = folder / "config.yaml"
    path.write_bytes(NEEDED + (lines if isinstance(lines, bytes) else lines.encode()))
    return read_arguments(MntpArguments, path)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("seed: 010", 10),
        ("seed: '010'", 10),
        ("seed: !!str 10", 10),
        ("learning_rate: 1e-3", 0.001),
        ("max_grad_norm: .inf", float("inf")),
        ("text_column: 010", "010"),
        ("text_column: 1:30", "1:30"),
        ("text_column: 2024-01-01", "2024-01-01"),
        ("text_column: yes", "yes"),
        ("text_column: true", "true"),
        ("text_column: 'null'", "null"),
        ("model_revision: 1234567e10", "1234567e10"),
        ("model_revision: ~", None),
        ("line_by_line: yes", True),
        ("lora_target_modules: [q_proj, 010, &x k_proj, *x]", ["q_proj", "010", "k_proj", "k_proj"]),
        ("optim_target_modules: [010, true]", ["010", "true"]),
        (
            "gradient_checkpointing_kwargs: {a: 010, b: 1e-3, c: 0x10, d: [true, ~, 'no']}",
            {"a": 10, "b": 0.001, "c": 16, "d": [True, None, "no"]},
        ),
    ],
)
def test_values_mean_what_a_person_reads(line: str, expected: object, tmp_path: Path) -> None:
    found = getattr(read(tmp_path, line + "\n"), line.split(":")[0])
    assert (found, type(found)) == (expected, type(expected))


@pytest.mark.parametrize("text", ["010", "1_000", "0x10", "1:30", "1e3", "3.0"])
def test_a_number_is_the_same_in_a_file_and_on_the_command_line(text: str, tmp_path: Path) -> None:
    def seed(lines: str, words: list[str]) -> int | str:
        (tmp_path / "config.yaml").write_bytes(NEEDED + lines.encode())
        try:
            return read_arguments(MntpArguments, tmp_path / "config.yaml", words).seed
        except UserError as error:
            return "refused" if "invalid int value" in str(error) else str(error)

    assert seed(f"seed: {text}\n", []) == seed("", [f"--seed={text}"])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("seed: 3\nlora_r: 2\nseed: 4", "has seed twice, in line 5 and in line 7: leave one of them out"),
        ("seed: 3\n'seed': 3", "has seed twice, in line 5 and in line 6"),
        ("lr_scheduler_kwargs:\n  a: 1\n  b: {c: 1,\n   c: 2}", "has c twice, in line 7 and in line 8"),
        ("a: &d {b: 1}\nlr_scheduler_kwargs:\n  <<: *d", "has the key << in line 7, which YAML 1.2 does not have"),
        ("accelerator_config: {even_batches: off}", "has off in line 5: write true or false, or put it in quotes"),
        ("seed: !!python/name:os.system x", "has the tag .*python/name:os.system in line 5: give plain values"),
        ("seed: !!int three", "has 'three' in line 5, which is no int"),
        ("? [a]\n: b", "has a key that is a list or mapping in line 5"),
        ("lr_scheduler_kwargs: &x {a: *x}", "has a value that holds itself"),
        ("seed: 3\n---\nseed: 4", "is not valid YAML: expected a single document .* line 6"),
        ("\tseed: 3", r"is not valid YAML: .*'\\t' that cannot start any token .* line 5"),
        ("line_by_line: on", "has line_by_line with an invalid bool value: 'on'"),
        ("learning_rate: 0,001", "has learning_rate with an invalid float value: '0,001'"),
    ],
)
def test_what_could_be_misread_is_refused_with_its_line(lines: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path, lines + "\n")
    assert "\n" not in str(caught.value)
    assert "config.yaml" in str(caught.value)


def test_files_of_other_systems_are_read_or_refused_by_their_line(tmp_path: Path) -> None:
    text = NEEDED.decode() + "text_column: é\nseed: 3\n"
    path = tmp_path / "config.yaml"
    for content in (text.encode("utf-8-sig"), text.replace("\n", "\r\n").encode(), text.encode("utf-16")):
        path.write_bytes(content)
        arguments = read_arguments(MntpArguments, path)
        assert (arguments.text_column, arguments.seed, arguments.output_dir) == ("é", 3, "out")
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"config.yaml is not UTF-8 in line 5: save it as UTF-8"):
        read_arguments(MntpArguments, path)


def test_a_list_given_twice_on_the_command_line_is_refused(tmp_path: Path) -> None:
    """Of two such options the second would count alone."""
    words = ["--model_name_or_path", "m", "--output_dir", "o", "--train-file", "a", "--train_file=b"]
    with pytest.raises(UserError, match="--train_file comes twice on the command line: give all its values after one"):
        read_arguments(MntpArguments, None, words)


@pytest.mark.parametrize("form", ["--lr_scheduler_kwargs={}", "--lr_scheduler_kwargs {}"])
def test_a_key_given_twice_in_an_object_on_the_command_line_is_refused(form: str) -> None:
    words = ["--model_name_or_path", "m", "--output_dir", "o", "--train_file", "a"]
    option = form.format('{"a":{"b":1,"b":2}}').split()
    with pytest.raises(UserError, match="on the command line has b twice: leave one of them out"):
        read_arguments(MntpArguments, None, [*words, *option])


STRINGS = (
    "010", "0o17", "0x1F", "1_000", "1e3", "1:30", ".5", ".inf", "null", "~", "", "no", "on", "true", "2024-01-01",
    "<<", "=", "a: b #c", " x ", "- a", "é\n  z\n", "'\"", "*a", "&a", "!a", "%", "@", "\\", "\ufeff", "\x00",
)  # fmt: skip


def test_every_string_is_written_so_that_it_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "some.yaml"
    for text in STRINGS:
        value = {"list": [text], "dict": {"a": [text, 1e-7, 1e22, True, None, 10]}}
        path.write_text("".join(written(name, x) for name, x in {"plain": text, **value}.items()), encoding="utf-8")
        assert read_yaml(path) == {"plain": text, **value}
        assert yaml.safe_load(path.read_text(encoding="utf-8")) == {"plain": text, **value}  # and for other programs


OFFERED = (True, False, 3, 0.25, 1e-7, 1e22, "a: b #c", "010", "null", "1e3", "no", "é\n x ", ["010", "~"], [],
           {"a": "010", "b": [1, None, True, "yes", "0o17"], "c": {"d": 0.1}}, {})  # fmt: skip
# What transformers takes as it comes, and its parser does not; and what is never written.
SPECIAL = {"debug", "include_num_input_tokens_seen", "hub_token", "push_to_hub_token"}


def fits(value: object, hint: Any) -> bool:
    """Whether a value is of a field's type."""
    if get_origin(hint) is list:
        return isinstance(value, list) and all(isinstance(x, get_args(hint)[0]) for x in value)
    if get_origin(hint) is dict or hint is dict:
        return isinstance(value, dict)
    if get_args(hint):
        return any(fits(value, inner) for inner in get_args(hint))
    return type(value) is hint


def chosen(kind: type[StageArguments], start: int) -> StageArguments:
    """Arguments with as many settings as go together set to something else than their default."""
    hints = get_type_hints(kind)
    given = {"model_name_or_path": "m", "train_file": ["a"], "output_dir": "o", "use_cpu": True}
    for number, item in enumerate(x for x in fields(kind) if x.init and x.name not in given.keys() | SPECIAL):
        offers = [OFFERED[(7 * number + 5 * start + shift) % len(OFFERED)] for shift in range(len(OFFERED))]
        for value in offers:
            if fits(value, hints[item.name]) and value != item.default:
                try:
                    kind(**copy.deepcopy({**given, item.name: value}))
                except Exception:  # whatever it refuses is no setting to write
                    continue
                given[item.name] = value
                break
    return kind(**copy.deepcopy(given))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [MntpArguments, SimcseArguments, ContrastiveArguments, WordLevelArguments])
def test_settings_that_are_written_read_back_the_same(kind: type[StageArguments], tmp_path: Path) -> None:
    counted = 0
    for start in range(2):
        arguments = chosen(kind, start)
        write_arguments(arguments, tmp_path)
        again = read_arguments(kind, tmp_path / "training_config.yaml")
        for item in fields(kind):
            before, after = (getattr(x, item.name) for x in (arguments, again))
            before, after = (x.to_dict() if hasattr(x, "to_dict") else x for x in (before, after))
            assert (after, type(after)) == (before, type(before)), item.name
            counted += before != item.default
    assert counted > 100
