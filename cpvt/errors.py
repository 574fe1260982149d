"""What goes wrong by the user's input: one line that says what was given, what was expected and what to do.

The command line prints these, and a path or a full disk, without a traceback and exits with status 2; any
other error is a fault of ours.
"""

import difflib
import functools
import inspect
import numbers
from collections.abc import Callable, Iterable, Sequence
from types import UnionType
from typing import Any, get_args, get_origin


class UserError(ValueError):
    """The base of all of them."""


class ConfigError(UserError):
    """A configuration that makes no sense."""


class DataError(UserError):
    """Images, or a request for images, that cannot be used."""


class TrainingError(UserError):
    """A run that does not come to its end: its loss does not stay finite, its model cannot be written."""


class ResultsError(UserError):
    """Measured or published rows that cannot be used."""


def nearest(given: str, known: Iterable[str]) -> str:
    """A phrase that names the known words closest to `given`, for messages."""
    known = sorted(known)
    close = difflib.get_close_matches(str(given), known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}"


def check_name(what: str, given: str, known: Iterable[str]) -> None:
    """Raises ConfigError unless `given` is one of the known names; `what` says of which kind."""
    if given not in known:
        raise ConfigError(f"no {what} {given!r}; {nearest(given, known)}")


_WIDER = {int: numbers.Integral, float: numbers.Real, tuple: Sequence}


def typed(function: Callable) -> Callable:
    """The same function; for an argument of another kind than its signature says, a TypeError that names both."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args, **kwargs):
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            hint = signature.parameters[name].annotation
            if hint is Any or not isinstance(hint, type | UnionType):
                continue  # what is in a list or a tuple is looked at where it is used
            kinds = [get_origin(part) or part for part in get_args(hint) or [hint]]
            if not isinstance(value, kinds := tuple(_WIDER.get(kind, kind) for kind in kinds)):
                shown = f"{function.__name__}: {name}={value!r}"[:100].splitlines()[0]
                wanted = " or ".join(kind.__name__ for kind in kinds)
                raise TypeError(f"{shown}, of type {type(value).__name__}; expected {wanted}")
        return function(*args, **kwargs)

    return call
