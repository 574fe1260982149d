"""Stop-watches: side by side in rounds, loaders drained or feeding a step, within a budget of minutes.

Machines are shared and their clocks wander, so what is compared is measured in turns, A B A B ..., and each
round gives a ratio of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor

from cpvt.errors import ConfigError

Batches = Iterator[tuple[Tensor, Tensor]]  # images and targets


def waiter(device: str) -> Callable[[], None]:
    """What waits until the device has done all that it was given."""
    return torch.cuda.synchronize if "cuda" in device else lambda: None


def seconds_of(work: Callable[[], object], device: str, times: int = 1, warm: int = 0) -> float:
    """Seconds of one call, the mean of `times` in a row; `warm` calls before are not counted."""
    wait = waiter(device)
    for _ in range(warm):
        work()
    wait()
    started = time.perf_counter()
    for _ in range(times):
        work()
    wait()
    return (time.perf_counter() - started) / times


def in_rounds(
    measures: dict[str, Callable[[], float]], rounds: int, budget: Budget
) -> dict[str, list[float]]:
    """Each measure once a round, in turns; whole rounds while the budget lasts, one at least."""
    found: dict[str, list[float]] = {name: [] for name in measures}
    for number in range(rounds):
        started = time.monotonic()
        for name, measure in measures.items():
            found[name].append(measure())
        if number + 1 < rounds and not budget.allows(time.monotonic() - started):
            break
    return found


def spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """Metrics of a row: the median over rounds as `name`, the extremes as `name`/min and `name`/max."""
    return {name: median(values), f"{name}/min": min(values), f"{name}/max": max(values)}


def ratios(values: Sequence[float], others: Sequence[float]) -> list[float]:
    """Round by round."""
    return [a / b for a, b in zip(values, others, strict=True)]


@dataclass
class Budget:
    """Minutes that may be spent, 0: without end; parts of it can be held back for what comes later.

    until   share of the budget that may be used up by now
    """

    minutes: float
    until: float = 1.0
    started: float = field(default_factory=lambda: time.monotonic())

    def __post_init__(self):
        if not 0 <= self.minutes < float("inf"):
            raise ConfigError(f"budget_minutes={self.minutes:g}: give minutes, or 0 for no limit")

    def allows(self, seconds: float) -> bool:
        """Whether something that takes so long may still begin."""
        spent = time.monotonic() - self.started
        return not self.minutes or spent + seconds <= 60 * self.minutes * self.until


# --------------------------------------------------------------------------- loaders


def drain(batches: Batches, seconds: float, device: str, warm: float = 1.0) -> float:
    """Images a second of a loader that nobody slows down, over `seconds` after `warm` seconds and a batch."""
    wait, images = waiter(device), 0
    next(batches)  # processes start, kernels are compiled
    _until(batches, time.perf_counter() + warm)
    wait()
    started = time.perf_counter()
    images = _until(batches, started + seconds)
    wait()
    return images / (time.perf_counter() - started)


def _until(batches: Batches, end: float) -> int:
    images = 0
    while time.perf_counter() < end:
        images += len(next(batches)[0])
    return images


def feed(
    batches: Batches, step: Callable[[Tensor, Tensor], object], seconds: float, device: str, warm: float = 1.0
) -> tuple[float, float]:
    """-> images a second of a step that these batches feed, and the share of the time it stood idle, 0 to 1.

    Idle is what passes between a step's last kernel and the moment when the next batch is there, on the
    stream of the model, by its own clock; on a CPU what passes in waiting for the next batch.
    """
    wait, waits, images, counting = waiter(device), [], 0, False
    step(*next(batches))
    wait()
    started = time.perf_counter()
    end = started + warm
    while True:
        if time.perf_counter() >= end:
            if counting:
                break
            wait()
            started, images, counting = time.perf_counter(), 0, True
            end, waits = started + seconds, []
        idle = _mark(device)
        batch = next(batches)
        waits.append((idle, _mark(device)))
        step(*batch)
        images += len(batch[0])
    wait()
    total = time.perf_counter() - started
    return images / total, sum(_between(*pair) for pair in waits) / total


def _mark(device: str) -> float | torch.cuda.Event:
    if "cuda" not in device:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start, end) -> float:
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1000


def joined(batches: Iterable[tuple[Tensor, Tensor]], count: int) -> Batches:
    """`count` batches as one, without end: the loader's epochs follow each other."""
    images, targets = [], []
    while True:
        for image, target in batches:
            images.append(image)
            targets.append(target)
            if len(images) == count:
                yield torch.cat(images), torch.cat(targets)
                images, targets = [], []
