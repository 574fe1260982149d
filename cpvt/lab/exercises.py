"""What an exercise's check says: right, or what was expected, what came, and a hint."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class NotYet(Exception):
    """An answer that is not right; its words are for the reader."""


def expect(case: str, came: Any, expected: Any, hint: str, tolerance: float = 1e-6) -> None:
    """Raises NotYet unless `came` equals `expected`: tensors and numbers to the tolerance, all else exactly."""
    if isinstance(expected, Tensor):
        if not isinstance(came, Tensor) or came.shape != expected.shape:
            raise NotYet(
                f"{case}: expected a tensor of shape {tuple(expected.shape)}, got {_kind(came)}. {hint}"
            )
        if not torch.allclose(came.to(expected), expected, rtol=tolerance, atol=tolerance):
            gap = (came.to(expected) - expected).abs().max().item()
            raise NotYet(f"{case}: the shape is right, the values are up to {gap:.2g} off. {hint}")
    elif isinstance(expected, float):
        if not isinstance(came, int | float) or abs(came - expected) > tolerance * max(1, abs(expected)):
            raise NotYet(f"{case}: expected {expected:.4g}, got {_kind(came)}. {hint}")
    elif came != expected:
        raise NotYet(f"{case}: expected {expected!r}, got {_kind(came)}. {hint}")


def _kind(came: Any) -> str:
    if isinstance(came, Tensor):
        return f"a tensor of shape {tuple(came.shape)}" if came.dim() else f"{came.item():.4g}"
    return (
        repr(came)
        if came is None or isinstance(came, int | float | str | set | tuple)
        else type(came).__name__
    )


def check(name: str, checks: Callable[[Any], None], answer: Any) -> None:
    """Prints "NAME: right", or "NAME: not yet" and why; what the reader's own code raises is said too."""
    try:
        checks(answer)
    except NotYet as why:
        print(f"{name}: not yet. {why}")
    except Exception as error:
        print(f"{name}: not yet. Your code raised {type(error).__name__}: {error}")
    else:
        print(f"{name}: right")
