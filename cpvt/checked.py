"""Frozen dataclasses from untyped values: names and types are checked, and every refusal is one line."""

from __future__ import annotations

import dataclasses
import difflib
import json
from typing import Any, get_args, get_type_hints


class ConfigError(ValueError):
    """A configuration that makes no sense; the message says what was given and what to do."""


def nearest(given: str, known) -> str:
    """A phrase naming the known words closest to `given`, for error messages."""
    known = sorted(known)
    close = difflib.get_close_matches(given, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}"


def to_json(config: Any) -> str:
    """A configuration -> one line of JSON."""
    return json.dumps(dataclasses.asdict(config))


def from_json(cls: type, text: str) -> Any:
    """One line of JSON -> a `cls`, equal to the one written. Unknown keys and wrong types are refused."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{cls.__name__}: not JSON ({error})") from None
    return build(cls, values, cls.__name__)


def replace(config: Any, **values: Any) -> Any:
    """A copy with some fields changed; unlike `dataclasses.replace`, names and types are checked."""
    own = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return build(type(config), {**own, **values}, type(config).__name__)


def build(cls: type, values: Any, where: str) -> Any:
    """Checks names and types, then builds; `where` opens every message."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: expected an object with the fields of {cls.__name__}, got {values!r}")
    hints = get_type_hints(cls)
    for name in values:
        if name not in hints:
            raise ConfigError(f"{where}: no option {name!r}; {nearest(name, hints)}")
    return cls(**{name: check(value, hints[name], f"{where}: {name}") for name, value in values.items()})


def check(value: Any, hint: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else build(hint, value, where)
    options = get_args(hint)
    if options and all(isinstance(option, str) for option in options):  # a Literal
        if value not in options:
            raise ConfigError(f"{where}={value!r}; expected one of {', '.join(map(repr, options))}")
        return value
    if options:  # a tuple of numbers, of any length (..., last) or of just this one
        length = None if options[-1] is Ellipsis else len(options)
        if isinstance(value, range):
            value = tuple(value)
        kinds = (int, float) if options[0] is float else (int,)
        fine = isinstance(value, list | tuple) and all(type(v) in kinds for v in value)
        if not fine or length not in (None, len(value)):
            words = "numbers" if options[0] is float else "whole numbers"
            raise ConfigError(f"{where}={value!r}; expected {length or 'a list of'} {words}")
        return tuple(map(options[0], value))
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise ConfigError(f"{where}={value!r}; expected {hint.__name__}")
    return value
