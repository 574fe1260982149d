"""What goes wrong by the user's input: one line that says what was given, what was expected and what to do.

The command line prints these, and a path or a full disk, without a traceback and exits with status 2; any
other error is a fault of ours.
"""

import difflib
from collections.abc import Iterable


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
