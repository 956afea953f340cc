"""JSON that was read from a file becomes a dataclass, or an error that names the value that is none of its kind.

What a folder says of itself may come from anywhere: a name that the dataclass does not have, or a value of another
type, never reaches the code behind it."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints, is_typeddict

Made = TypeVar("Made")
_SHOWN_CHARACTERS = 60


class MistypedError(ValueError):
    """A value that was read is not of the type that is written there; the message says which."""


def dataclass_from(kind: type[Made], value: Any, where: str) -> Made:
    """Make a ``kind`` of a JSON object.

    Args:
        kind: a dataclass; see `of_type` for its fields.
        value: as `json.loads` gives it.
        where: what is read, for the message.

    Raises:
        MistypedError: a name is missing or unknown, or a value is of another type.
    """
    return kind(**_checked_names(*_names_of(kind), value, where))


def of_type(kind: Any, value: Any, where: str) -> Any:
    """``value`` as a type hint wants it: a list becomes a tuple, an object a dataclass.

    Args:
        kind: str, int, float, bool, None, list, tuple or dict with or without what they hold, a dataclass, a TypedDict,
            a Literal, a union of those, or Any.

    Raises:
        MistypedError: it is of another type.
    """
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if kind is Any or (kind is float and type(value) is int):
        return value
    if is_dataclass(kind):
        return dataclass_from(kind, value, where)  # type: ignore[arg-type]
    if is_typeddict(kind):
        return _checked_names(*_names_of(kind), value, where)
    if origin in (Union, types.UnionType):
        return _of_union(kind, value, where)
    if origin is Literal and value in inner:
        return value
    if origin in (list, tuple, Sequence) and isinstance(value, list):
        items = [of_type(inner[0], item, f"an item of {where}") for item in value] if inner else value
        return tuple(items) if origin is tuple else items
    if origin in (dict, Mapping) and isinstance(value, dict):
        return (
            {name: of_type(inner[1], item, f"{name!r} of {where}") for name, item in value.items()} if inner else value
        )
    if kind is type(value) and (kind is not int or -(2**63) <= value < 2**63):  # True is no number here
        return value
    raise MistypedError(f"{where} is {shown(value)}, not {_name_of(kind)}")


def shown(value: Any) -> str:
    """A value for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"


@cache
def _names_of(kind: Any) -> tuple[dict[str, Any], frozenset[str]]:
    """The types of a dataclass's or TypedDict's names, and the names that must be there; asked for every part."""
    hints = get_type_hints(kind)
    if is_typeddict(kind):
        return hints, kind.__required_keys__
    return hints, frozenset(f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING)


def _checked_names(hints: dict[str, Any], needed: frozenset[str], value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise MistypedError(f"{where} is {shown(value)}, not an object")
    for name in sorted(needed - value.keys()):
        raise MistypedError(f"{where} has no {name!r}")
    for name in sorted(value.keys() - hints.keys()):
        raise MistypedError(f"{where} has {shown(name)}, which this program does not know")
    return {name: of_type(hints[name], item, f"{name} of {where}") for name, item in value.items()}


def _of_union(kind: Any, value: Any, where: str) -> Any:
    for choice in get_args(kind):
        try:
            return of_type(choice, value, where)
        except MistypedError:
            continue
    raise MistypedError(f"{where} is {shown(value)}, not {_name_of(kind)}")


def _name_of(kind: Any) -> str:
    return " or ".join(map(_name_of, get_args(kind))) or getattr(kind, "__name__", repr(kind))
