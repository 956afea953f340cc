"""A configuration in YAML, by the core schema of YAML 1.2: 010 is ten, no is a word, and each key comes once.

PyYAML follows YAML 1.1, where 010 is eight, 1:30 is ninety and of two equal keys the last counts.
"""

from __future__ import annotations

import codecs
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import yaml

from llm2vec_fast.errors import UserError

_TAG = "tag:yaml.org,2002:"
_CORE = {  # of unquoted words: the type, its pattern, and the characters that it starts with
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}
_NO_LONGER_BOOL = ("yes", "no", "on", "off")
_CONTAINERS = {yaml.MappingNode: "map", yaml.SequenceNode: "seq"}


@dataclass(frozen=True)
class Number:
    """A number or truth value of a file: ``text`` as it is written, ``value`` as YAML has it."""

    text: str
    value: bool | int | float

    def __str__(self) -> str:
        return self.text

    __repr__ = __str__


class CoreLoader(yaml.SafeLoader):
    """Finds the types of words by the core schema."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}


class Dumper(yaml.SafeDumper):
    """Quotes each string that is something else in YAML 1.1 or in the core schema."""


for _kind in (CoreLoader, Dumper):
    for _name, (_pattern, _starts) in _CORE.items():
        _kind.add_implicit_resolver(_TAG + _name, re.compile(rf"(?:{_pattern})\Z"), _starts)


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys of a file with their values: None, strings, `Number`, lists of them, and dicts of plain values.

    Raises:
        UserError: it cannot be read, is no YAML, has a key twice, or something other than plain data; with the lines.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"the configuration {path} cannot be read: {error.strerror}") from error
    try:
        utf_16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        root = yaml.compose(content.decode("utf-16" if utf_16 else "utf-8-sig"), Loader=CoreLoader)
        found = None if root is None else _value(root, nested=False)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"the configuration {path} is not UTF-8 in line {line}: save it as UTF-8") from error
    except yaml.YAMLError as error:
        raise UserError(f"the configuration {path} is not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise UserError(f"the configuration {path} has a value that holds itself: write it out") from error
    except _RefusedError as error:
        raise UserError(f"the configuration {path} {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"the configuration {path} holds no keys: write one key: value a line")
    return found


def written(name: str, value: Any) -> str:
    """A key and its value as lines of YAML that `read_yaml` takes for the same.

    Raises:
        yaml.YAMLError: it is no plain data.
    """
    return yaml.dump({name: value}, Dumper=Dumper, allow_unicode=True)


class _RefusedError(Exception):
    """What a file must not have, without the file's name."""


def _value(node: yaml.Node, *, nested: bool) -> Any:
    """What a node holds; numbers that are not inside a dict keep their text."""
    name = node.tag.removeprefix(_TAG)
    if name not in (_CONTAINERS.get(type(node)), *(["str", *_CORE] if isinstance(node, yaml.ScalarNode) else [])):
        raise _RefusedError(f"has the tag {node.tag} in line {_line(node)}: give plain values")
    if isinstance(node, yaml.MappingNode):
        return _dict(node, nested=nested)
    if isinstance(node, yaml.SequenceNode):
        return [_value(inner, nested=nested) for inner in node.value]
    text = node.value
    if name == "str":
        if nested and node.style is None and text.lower() in _NO_LONGER_BOOL:  # a string, and so true whatever it says
            raise _RefusedError(f"has {text} in line {_line(node)}: write true or false, or put it in quotes")
        return text
    if not re.fullmatch(_CORE[name][0], text):
        raise _RefusedError(f"has {text!r} in line {_line(node)}, which is no {name}")
    if name == "null":
        return None
    value = {"bool": _bool, "int": _int, "float": _float}[name](text)
    if nested:
        return value
    return Number(text if text.lower().lstrip("-+") not in (".inf", ".nan") else str(value), value)


def _dict(node: yaml.MappingNode, *, nested: bool) -> dict[str, Any]:
    lines: dict[str, int] = {}
    found = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise _RefusedError(f"has a key that is a list or mapping in line {_line(key)}: give a name")
        if key.value == "<<":
            raise _RefusedError(
                f"has the key << in line {_line(key)}, which YAML 1.2 does not have: write its keys out"
            )
        if key.value in lines:
            raise _RefusedError(
                f"has {key.value} twice, in line {lines[key.value]} and in line {_line(key)}: leave one of them out"
            )
        lines[key.value] = _line(key)
        inside = nested or isinstance(value, yaml.MappingNode)
        found[key.value] = _value(value, nested=inside)
    return found


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _bool(text: str) -> bool:
    return text.lower() == "true"


def _int(text: str) -> int:
    return int(text[2:], {"0o": 8, "0x": 16}[text[:2]]) if text[:2] in ("0o", "0x") else int(text)


def _float(text: str) -> float:
    return float(re.sub(r"\.(?=[iInN])", "", text))
