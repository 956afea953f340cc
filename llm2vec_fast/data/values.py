"""Types of ids and kept columns, and values of them: nothing is made of a value that it is not."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from llm2vec_fast.data.rows import half_character
from llm2vec_fast.errors import InputError

JSON_INTEGERS = range(-(2**63), 2**64)
_is = pa.types


def is_string(kind: pa.DataType) -> bool:
    return _is.is_string(kind) or _is.is_large_string(kind) or _is.is_string_view(kind)


def is_binary(kind: pa.DataType) -> bool:
    """Bytes of any length."""
    return _is.is_binary(kind) or _is.is_large_binary(kind) or _is.is_binary_view(kind)


def is_text(kind: pa.DataType) -> bool:
    """Whether values may be texts: strings, bytes that may be UTF-8, or nothing."""
    value = kind.value_type if _is.is_dictionary(kind) else kind
    return is_string(value) or is_binary(value) or _is.is_null(value)


def is_id(kind: pa.DataType) -> bool:
    """Whether values may be ids: one thing each, and more than yes or no."""
    return not (_is.is_nested(kind) or _is.is_boolean(kind))


def stored_type(kind: pa.DataType) -> pa.DataType:
    """The type in which values of a type are written: the same, but without dictionaries, which belong to their file,
    and views, which not every reader knows."""
    if _is.is_dictionary(kind):
        return stored_type(kind.value_type)
    if _is.is_string_view(kind):
        return pa.string()
    return pa.binary() if _is.is_binary_view(kind) else kind


def python_values(column: pa.Array) -> list[Any]:
    """The column's values: Python's own where these say the same, else arrays of one; None for none. Bytes for strings
    that are not UTF-8."""
    if isinstance(column, pa.ChunkedArray):
        return [value for chunk in column.chunks for value in python_values(chunk)]
    if _is.is_dictionary(column.type):
        column = column.dictionary_decode()
    if not _is_plain(column.type):
        return [column.slice(i, 1) if column[i].is_valid else None for i in range(len(column))]
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return column.cast(pa.large_binary()).to_pylist()


def to_array(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """Values that `python_values` or JSON gave as an array of a type that holds them; where that is strings, anything
    else becomes its JSON."""
    if is_string(kind):
        return pa.array([value if value is None else as_string(value) for value in values], kind)
    if _is_plain(kind):
        return pa.array(values, kind)
    nothing = pa.nulls(1, kind)
    pieces = [nothing if value is None else value for value in values]
    return pa.concat_arrays([piece.cast(kind) for piece in pieces]) if pieces else pa.array([], kind)


def as_string(value: Any) -> str:
    """A string as it is, bytes as the UTF-8 they are, any other value of JSON as it stands there, NaN too."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()  # \ud83d


def json_bytes(value: Any) -> bytes:
    """A value as JSON in UTF-8. Half a character stays the escape that it must have been; there are no dates, which are
    ISO 8601 texts; no bytes, which are base64; no NaN, which is null."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, default=_plain_json)
    except ValueError:
        text = json.dumps(_finite(value), ensure_ascii=False, default=_plain_json)
    return text.encode("utf-8", "backslashreplace")  # \ud83d, as JSON writes it


def shown_value(value: Any) -> Any:
    """A value for a report in JSON or on a console: bytes as the text they are, with escapes; dates as ISO 8601."""
    if isinstance(value, pa.Array):
        value = _text_of_one(value)
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    return json.loads(json_bytes(value))


def id_problem(value: Any, column: str) -> str | None:
    """What is wrong with a value as an id."""
    if isinstance(value, pa.Array):
        value = value[0].as_py() if _is.is_float16(value.type) else str(value)
    nothing = value is None or value == "" or value == b"" or value != value
    if nothing or isinstance(value, bool | list | dict):
        shown = "null" if value is None else repr(value)[:40]
        return f"the id (column {column!r}) is {shown}, not a string or number"
    return half_character(value, "id") if isinstance(value, str) else None


def kept_problem(value: Any, column: str, kind: pa.DataType) -> str | None:
    """What is wrong with a value that is kept: only strings can be none."""
    if isinstance(value, str):
        return half_character(value, f"column {column!r}")
    if isinstance(value, bytes) and is_string(kind):
        try:
            value.decode()
        except UnicodeDecodeError as error:
            return f"byte 0x{value[error.start]:02x} at byte {error.start} of the column {column!r} is not UTF-8"
    return None


class JsonKinds:
    """Which kinds of values a column of JSON has."""

    def __init__(self) -> None:
        self._kinds: set[str] = set()

    def add(self, value: Any) -> None:
        if value is not None:
            self._kinds.add(_kind_of(value))

    @property
    def type(self) -> pa.DataType | None:
        """The type that holds every value as it is: of strings, booleans, whole numbers or decimal fractions where the
        column has one of these alone; strings (of JSON, where the value is none) for all else; None where it has none.
        """
        if not self._kinds:
            return None
        if self._kinds <= {"int64", "uint64", "negative"}:
            if self._kinds >= {"uint64", "negative"}:
                return pa.string()
            return pa.uint64() if "uint64" in self._kinds else pa.int64()
        kinds = {"string": pa.string(), "bool": pa.bool_(), "float64": pa.float64()}
        return kinds.get(next(iter(self._kinds)), pa.string()) if len(self._kinds) == 1 else pa.string()


def unified(name: str, found: Sequence[tuple[str, pa.DataType]], of_json: pa.DataType | None) -> pa.DataType:
    """One type for a column of several files that changes no value of it.

    Args:
        found: what the file is shown as, and its type there.
        of_json: the type of files of JSON, in which values may be written as JSON, too.

    Raises:
        InputError: there is none; it names two files and their types.
    """
    kinds: dict[pa.DataType, str] = {}
    for shown, kind in found:
        if not _is.is_null(kind):
            kinds.setdefault(kind, shown)
    if of_json is not None and any(map(is_string, kinds)):
        of_json = pa.string()
    if of_json is not None:
        kinds.setdefault(of_json, "the JSON files")
    if not kinds:
        return found[0][1] if found else pa.string()
    common = next(iter(kinds))
    for kind in kinds:
        wider = _common(common, kind)
        if wider is None:
            raise InputError(
                f"column {name!r} is {common} in {kinds.get(common, next(iter(kinds.values())))} and {kind} in "
                f"{kinds[kind]}: make it of one type, or embed the files into folders of their own"
            )
        common = wider
    return common


def types_to_text(types: dict[str, pa.DataType]) -> str:
    """Types by name as a text that `types_from_text` reads."""
    return base64.b64encode(pa.schema(list(types.items())).serialize().to_pybytes()).decode()


def types_from_text(text: str) -> dict[str, pa.DataType]:
    """See `types_to_text`."""
    schema = pa.ipc.read_schema(pa.BufferReader(base64.b64decode(text)))
    return {field.name: field.type for field in schema}


def _is_plain(kind: pa.DataType) -> bool:
    """Whether Python's objects say exactly what values of the type do."""
    tests = (_is.is_integer, _is.is_float32, _is.is_float64, _is.is_boolean, _is.is_decimal, _is.is_date32, _is.is_null)
    return is_string(kind) or is_binary(kind) or _is.is_fixed_size_binary(kind) or any(test(kind) for test in tests)


def _common(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """The narrowest type that holds the values of both as they are."""
    if one.equals(other):
        return one
    both = (one, other)
    if all(map(_is.is_integer, both)):
        return _common_integer(one, other)
    if all(map(_is.is_floating, both)):
        return max(both, key=lambda kind: kind.bit_width)
    if all(map(is_string, both)):
        return pa.large_string()
    if all(is_binary(kind) or _is.is_fixed_size_binary(kind) for kind in both):
        return pa.large_binary() if any(map(_is.is_large_binary, both)) else pa.binary()
    if all(map(_is.is_decimal, both)) and one.scale == other.scale:
        return max(both, key=lambda kind: kind.precision)
    return None


def _common_integer(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    signed, unsigned = (one, other) if _is.is_signed_integer(one) else (other, one)
    if _is.is_signed_integer(one) == _is.is_signed_integer(other):
        return max((one, other), key=lambda kind: kind.bit_width)
    width = max(signed.bit_width, 2 * unsigned.bit_width)
    return {16: pa.int16(), 32: pa.int32(), 64: pa.int64()}.get(width)


def _kind_of(value: Any) -> str:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        if value not in JSON_INTEGERS:
            return "long"
        return "negative" if value < 0 else "int64" if value < 2**63 else "uint64"
    kinds = {str: "string", float: "float64"}
    return kinds.get(type(value), "nested")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plain_json(value: Any) -> Any:
    if isinstance(value, pa.Array):
        return _text_of_one(value)
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def _text_of_one(array: pa.Array) -> Any:
    """The value of an array of one, for JSON."""
    try:
        value = array[0].as_py()
    except ValueError:  # nanoseconds, which Python's own times have not
        value = str(array.cast(pa.string())[0]) if _is.is_temporal(array.type) else str(array[0])
    if _is.is_timestamp(array.type) and array.type.unit == "ns":
        return array.cast(pa.string())[0].as_py().replace(" ", "T", 1)
    if _is.is_time64(array.type):
        return array.cast(pa.string())[0].as_py()
    return float(value) if _is.is_float16(array.type) else value
