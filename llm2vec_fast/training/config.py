"""A stage's arguments from a YAML file and from the command line; what was meant is named where a key is unknown."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser, TrainingArguments

from llm2vec_fast.errors import UserError
from llm2vec_fast.jobs.files import replacing
from llm2vec_fast.training.arguments import StageArguments
from llm2vec_fast.training.settings.checks import default_of, equals_default
from llm2vec_fast.training.yaml_file import Number, read_yaml, written

Arguments = TypeVar("Arguments", bound=StageArguments)
RESOLVED = "training_config.yaml"
_STEPS, _EPOCHS = "max_steps", "num_train_epochs"
_ALWAYS_SHOWN = ("output_dir", "learning_rate", "seed")
_HINT = "llm2vec-fast train STAGE --options tells what there is"
READY = Path(__file__).parent / "configs"


def read_arguments(kind: type[Arguments], config: str | Path | None, overrides: Sequence[str] = ()) -> Arguments:
    """The arguments of a stage.

    Args:
        kind: the stage's dataclass.
        config: a YAML file of ``key: value``, the name of a ready one of this stage (`ready_configs`), or None.
        overrides: what follows on the command line, ``--key value``; it wins. Epochs given here win over steps of the
            file; where both are given in one place, steps do.

    Raises:
        UserError: the file cannot be read, a key is unknown, or a value is not of its type or out of range.
    """
    names = {item.name for item in dataclasses.fields(kind) if item.init}
    given = {} if config is None else read_yaml(_find(Path(config), kind.STAGE))
    for key in given:
        _require_known(str(key), names, f"the file {config}")
    parser = _Parser(kind, prog=kind.__name__, allow_abbrev=False)
    several = {action.dest for action in parser._actions if action.nargs == "+"}
    asked = [word[2:].split("=")[0].replace("-", "_") for word in overrides if word.startswith("--")]
    for key in asked:  # before values are looked at: a misspelt key must not be told as a missing one
        if key.removeprefix("no_") not in names:
            _require_known(key, names, "the command line")
        if key in several and asked.count(key) > 1:
            raise UserError(f"--{key} comes twice on the command line: give all its values after one")
    for word in overrides:
        _require_once(word.partition("=")[2] if word.startswith("--") else word)
    if _goes_by_epochs(asked, given):
        given[_STEPS] = -1
    parser.set_defaults(**_typed(given, parser, kind, f"the file {config}"))
    try:
        arguments, rest = parser.parse_args_into_dataclasses(
            args=list(overrides), look_for_args_file=False, return_remaining_strings=True
        )
    except ValueError as error:  # what transformers refuses
        raise UserError(f"{' '.join(str(error).split())} ({_HINT})") from error
    if rest:
        raise UserError(f"{rest[0]!r} on the command line belongs to no option: write --key value")
    return arguments


def ready_configs(stage: str) -> dict[str, Path]:
    """The configurations that come with the library for a stage, by name."""
    return {path.stem: path for path in sorted((READY / stage).glob("*.yaml"))}


def own_options(kind: type[StageArguments], config: str | Path | None = None) -> list[tuple[str, str, str]]:
    """A stage's settings that transformers has not, then those with another default and those that every run has: name,
    value (of the configuration, where it has one), what it is."""
    given = {} if config is None else read_yaml(_find(Path(config), kind.STAGE))
    stock = {item.name: item for item in dataclasses.fields(TrainingArguments)}
    items = [item for item in dataclasses.fields(kind) if item.init]
    own = [item for item in items if item.name not in stock]
    changed = [
        item for item in items
        if item.name in stock
        and (default_of(item) != default_of(stock[item.name]) or item.name in given or item.name in _ALWAYS_SHOWN)
    ]  # fmt: skip
    return [
        (item.name, _shown(given.get(item.name, default_of(item))), item.metadata.get("help", ""))
        for item in [*own, *changed]
    ]


def write_arguments(arguments: StageArguments, folder: Path) -> None:
    """Every setting that differs from its default, but tokens of the hub and what this machine alone decides, as a file
    that `read_arguments` takes.

    Raises:
        UserError: a setting is nothing that can be written.
    """
    # transformers 5 mirrors gradient_checkpointing under its new names, and would follow those and no longer the old.
    items = [item for item in dataclasses.fields(arguments) if not item.name.startswith("activation_checkpointing")]
    chosen = {}
    for item in items:
        value = getattr(arguments, item.name)
        unsaid = item.name.endswith("_token") or item.name in arguments.settled or not item.init
        if not unsaid and not equals_default(value, default_of(item)):
            chosen[item.name] = _written(item.name, value, folder / RESOLVED)
    if _EPOCHS in chosen:  # alone they would be read as going by them
        chosen[_STEPS] = _written(_STEPS, arguments.max_steps, folder / RESOLVED)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / RESOLVED) as file:
        file.write("".join(chosen[name] for name in sorted(chosen)).encode())


def _written(name: str, value: Any, path: Path) -> str:
    """A setting as lines of YAML."""
    try:
        return written(name, _plain(value))
    except yaml.YAMLError as error:
        raise UserError(f"{name}={value!r} cannot be written to {path}: give plain values or leave it out") from error


def _plain(value: Any) -> Any:
    value = value.to_dict() if hasattr(value, "to_dict") else getattr(value, "value", value)
    if isinstance(value, dict):
        return {_plain(key): _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def _goes_by_epochs(*places: Collection[str]) -> bool:
    """Whether the first of these places that tells how long to train tells it by epochs alone."""
    telling = next((place for place in places if _EPOCHS in place or _STEPS in place), (_STEPS,))
    return _STEPS not in telling


def _shown(default: Any) -> str:
    default = default.value if isinstance(default, Number) else default
    return " ".join(map(str, default)) if isinstance(default, list) else "" if default is None else str(default)


class _Parser(HfArgumentParser):
    """Refuses in one sentence instead of a page of usage."""

    def error(self, message: str) -> None:
        raise UserError(f"{message} ({_HINT})")


def _typed(given: dict[str, Any], parser: _Parser, kind: type[StageArguments], place: str) -> dict[str, Any]:
    """A file's values, each of its setting's type, as the command line reads them."""
    hints, stock = get_type_hints(kind), {item.name for item in dataclasses.fields(TrainingArguments)}
    actions = {action.dest: action for action in reversed(parser._actions)}  # --no_key comes after --key
    found = {}
    for key, value in given.items():
        kinds = {get_origin(hint) or hint: hint for hint in _members(hints[key])}
        try:
            if isinstance(getattr(value, "value", None), bool) and key in stock and actions[key].type is str:
                found[key] = value.value  # one that the annotations do not tell, such as fsdp: true
            else:
                found[key] = _read(value, set(kinds), actions[key].type, several=actions[key].nargs == "+")
        except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
            kinds.pop(NoneType, None)
            wanted = " or ".join(hint.__name__ if isinstance(hint, type) else str(hint) for hint in kinds.values())
            raise UserError(f"{place} has {key} with an invalid {wanted} value: {value!r} ({_HINT})") from error
    return found


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _read(value: Any, kinds: set[type], read: Callable[[str], Any], *, several: bool) -> Any:
    if several and value is not None and not isinstance(value, dict):
        return [_read(x, set(), read, several=False) for x in (value if isinstance(value, list) else [value])]
    if value is None or isinstance(value, list | dict):
        if type(value) not in kinds:
            raise TypeError
        return [_read(x, set(), str, several=False) for x in value] if isinstance(value, list) else value
    return read(str(value))


def _require_known(key: str, names: set[str], place: str) -> None:
    if key in names:
        return
    near = difflib.get_close_matches(key, names, n=1)
    hint = f"did you mean {near[0]}?" if near else _HINT
    raise UserError(f"{place} has an unknown key {key!r}: {hint}")


def _require_once(text: str) -> None:
    """Each key of a JSON object on the command line, of which Python takes the last."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise UserError(f"{text} on the command line has {twice} twice: leave one of them out")
        return dict(pairs)

    if text.startswith("{"):
        with suppress(ValueError):  # no JSON: whatever reads it says so
            json.loads(text, object_pairs_hook=once)


def _find(config: Path, stage: str) -> Path:
    ready = ready_configs(stage)
    if config.exists() or config.suffix in (".yaml", ".yml"):
        return config
    if str(config) not in ready:
        raise UserError(f"there is no configuration {str(config)!r}: give a YAML file or one of {', '.join(ready)}")
    return ready[str(config)]
