"""Fast roads are taken where they prove right: each is tried once, before it is used, beside the plain one."""

import warnings
from collections.abc import Callable

import torch

PROVEN = "proven"
verdicts: dict[str, str] = {}  # what was tried in this process -> PROVEN, or why it is not used


def proved(name: str, trial: Callable[[], str], instead: str) -> bool:
    """Whether `trial()` finds no fault with what is called `name`: it gives "", or what is wrong, or raises.

    It runs once a process; a fault is told in one warning, which also says what is done `instead`.
    """
    if name not in verdicts:
        try:
            fault = trial()
        except torch.OutOfMemoryError:
            raise  # no fault of the road
        except Exception as error:  # whatever compilers, drivers and libraries raise
            fault = f"{type(error).__name__}: {error}"
        verdicts[name] = " ".join(fault.split())[:300] or PROVEN
        if fault:
            warnings.warn(f"not used: {name} ({verdicts[name]}); instead: {instead}", stacklevel=3)
    return verdicts[name] == PROVEN
