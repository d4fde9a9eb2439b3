"""Values of the config: from TOML to the annotated Python type, and back to TOML text.

The annotations of config.py are the only description of a key's type. This module turns them into
checks (`convert`), into words (`describe`) and writes values out again (`toml_value`).
"""

import json
import math
import tomllib
import types
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal, Union, get_args, get_origin

NONE_TEXT = "none"
"""What stands for None in TOML, which has no null."""


@dataclass(frozen=True, slots=True)
class Typed:
    """A value typed on the command line: its text, and what TOML makes of it."""

    text: str
    value: Any


class MismatchError(Exception):
    """The value is not of the annotated type; the text says what is expected."""


def typed(text: str) -> Typed:
    """Reads a command-line value as TOML; what is not TOML is a string.

    "12" is an integer, "[1, 2]" a list, "cosine" a string. `convert` falls back to the text where
    a string is wanted, so a commit hash of digits stays as typed.
    """
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return Typed(text, text)
    return Typed(text, parsed["value"] if parsed.keys() == {"value"} else text)


def is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType)


def convert(value: Any, hint: Any) -> Any:
    """`value` as the annotation `hint` wants it. Raises MismatchError with what is expected.

    An integer serves as a float; true and false serve as no number; lists become tuples; the text
    "none" is None where None is allowed. On the command line one item serves as a list of one.
    """
    if isinstance(value, Typed):
        return _convert_typed(value, hint)
    if is_union(hint):
        return _convert_union(value, hint)
    origin = get_origin(hint)
    if origin is Literal:
        choices = get_args(hint)
        if isinstance(value, str) and value in choices:
            return value
        raise MismatchError(describe(hint) + _nearest_choice(value, choices))
    if origin is tuple:
        return _convert_tuple(value, hint)
    if origin is Mapping and isinstance(value, dict):
        return {convert(k, get_args(hint)[0]): _convert_item(k, v, hint) for k, v in value.items()}
    if hint is bool and isinstance(value, bool):
        return value
    if hint is str and isinstance(value, str):
        return value
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int and is_number and isinstance(value, int):
        return value
    if hint is float and is_number and math.isfinite(value):
        return float(value)
    raise MismatchError(describe(hint))


def _convert_typed(value: Typed, hint: Any) -> Any:
    hints = get_args(hint) if is_union(hint) else (hint,)
    candidates = [value.value, value.text]
    if any(get_origin(h) is tuple for h in hints) and not isinstance(value.value, list):
        candidates += [[value.value], [value.text]]
    first: MismatchError | None = None
    for candidate in candidates:
        try:
            return convert(candidate, hint)
        except MismatchError as error:
            first = first or error
    assert first is not None
    raise first


def _convert_union(value: Any, hint: Any) -> Any:
    options = get_args(hint)
    if type(None) in options and value == NONE_TEXT:
        return None
    choices: list[Any] = []
    for option in options:
        if option is type(None):
            continue
        try:
            return convert(value, option)
        except MismatchError:
            choices += get_args(option) if get_origin(option) is Literal else []
    raise MismatchError(describe(hint) + _nearest_choice(value, tuple(choices)))


def _convert_tuple(value: Any, hint: Any) -> tuple[Any, ...]:
    items = get_args(hint)
    if not isinstance(value, list):
        raise MismatchError(describe(hint))
    if items[-1] is not Ellipsis and len(value) != len(items):
        raise MismatchError(describe(hint))
    wanted = [items[0]] * len(value) if items[-1] is Ellipsis else list(items)
    converted = []
    for index, (item, item_hint) in enumerate(zip(value, wanted, strict=True)):
        try:
            converted.append(convert(item, item_hint))
        except MismatchError as error:
            raise MismatchError(f"{describe(hint)} (item {index} is {toml_value(item)})") from error
    return tuple(converted)


def _convert_item(key: str, value: Any, hint: Any) -> Any:
    """A value of a table."""
    try:
        return convert(value, get_args(hint)[1])
    except MismatchError as error:
        raise MismatchError(f"{describe(hint)} ({key} is {toml_value(value)})") from error


def _nearest_choice(value: Any, choices: tuple[Any, ...]) -> str:
    close = get_close_matches(value, choices, 1) if isinstance(value, str) else []
    return f'; did you mean "{close[0]}"?' if close else ""


def describe(hint: Any, plural: bool = False) -> str:
    """The annotation in words: "an integer", "one of "a", "b"", "a list of strings"."""
    if hint is type(None):
        return f'"{NONE_TEXT}"'
    if is_union(hint):
        return " or ".join(describe(option, plural) for option in get_args(hint))
    origin, items = get_origin(hint), get_args(hint)
    if origin is Literal:
        names = ", ".join(f'"{choice}"' for choice in items)
        if plural:
            return f"strings out of {names}"
        return f"one of {names}" if len(items) > 1 else names
    if origin is Mapping:
        return f"a table with keys out of {describe(items[0])[7:]}, of {describe(items[1], plural=True)}"
    if origin is tuple:
        count = "" if items[-1] is Ellipsis else f"{len(items)} "
        return f"a list of {count}{describe(items[0], plural=True)}"
    singular, many = {
        str: ("a string", "strings"),
        int: ("an integer", "integers"),
        float: ("a number", "numbers"),
        bool: ("true or false", "true or false"),
    }[hint]
    return many if plural else singular


def toml_value(value: Any) -> str:
    """One value as TOML text; what TOML cannot say (given by mistake) as Python shows it."""
    if isinstance(value, Typed):
        return value.text if value.text else '""'
    if value is None:
        return f'"{NONE_TEXT}"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON escapes all that TOML's basic strings forbid, but for DEL.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} = {toml_value(item)}" for key, item in value.items()) + "}"
    return repr(value) if isinstance(value, int | float) else str(value)
