"""Trains a planned row and measures it; measures what is missing of a list of rows, one after the other."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import torch

from cpvt.config import DataConfig, TrainConfig, from_json
from cpvt.data.loader import keep_images, open_batches
from cpvt.errors import ConfigError, ResultsError
from cpvt.lab.arrays import keep_arrays
from cpvt.lab.results import Row, append_row, commit, read_rows
from cpvt.lab.teacher import teach, teacher_top1
from cpvt.lab.timing import Budget
from cpvt.training.checkpoint import differences
from cpvt.training.distributed import SIGNALS, Stopped
from cpvt.training.train import Run, train


@dataclass(frozen=True)
class Planned:
    """One row to come: its name in the table and the run; what scores the run, and what gives its batches.

    score    run -> metrics, the name of the data, and the SHA-256 of what was evaluated on
    arrays   run -> small arrays that are kept beside the row (see `arrays.py`), or nothing

    A teacher that the configuration names is trained first, where it has no weights.
    """

    experiment: str
    row: str
    scale: str
    config: TrainConfig
    score: Callable[[Run], tuple[dict[str, float], str, str]]
    open_data: Callable = open_batches
    arrays: Callable[[Run], dict[str, torch.Tensor]] = lambda run: {}

    @property
    def key(self) -> tuple:
        return self.experiment, self.row, self.scale, self.config.run.seed


def rooted(config: TrainConfig, root: str) -> TrainConfig:
    """The configuration with the folder of its images, or as it is where `root` is empty."""
    return replace(config, data=replace(config.data, root=root or config.data.root))


def measure(planned: Planned) -> Row:
    """Trains and measures one planned row. Raises Stopped where a signal came in between."""
    return measured(planned)[0]


def measured(planned: Planned) -> tuple[Row, dict[str, torch.Tensor]]:
    """`measure`, and the arrays that are kept beside the row."""
    started = time.perf_counter()
    config = teach(planned.config)
    run = train(config, open_data=planned.open_data)
    if run.interrupted:
        raise Stopped(f"{planned.row}: stopped by {run.interrupted}")
    for module in run.model.modules():  # scored as written: hooks are set, and sizes asked for once
        module._compiled_call_impl = None
    metrics, dataset, digest = planned.score(run)
    row = Row(
        experiment=planned.experiment,
        row=planned.row,
        scale=planned.scale,
        dataset=dataset,
        dataset_sha256=digest,
        seed=planned.config.run.seed,
        config=dataclasses.asdict(rooted(planned.config, DataConfig.root)),  # wherever the images lay
        metrics={
            **metrics,
            **teacher_top1(config),
            "steps": run.steps,
            "loss": run.history[-1]["loss"],
            "parameters": sum(p.numel() for p in run.model.parameters()),
        },
        weights="raw",
        seconds=round(time.perf_counter() - started, 1),
        device=_device_name(run),
        torch=torch.__version__,
        cpvt_commit=commit(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    return row, planned.arrays(run)


def _device_name(run: Run) -> str:
    device = next(run.model.parameters()).device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def measure_missing(
    plans: Iterable[Planned],
    path: Path,
    budget_minutes: float = 0.0,
    report: Callable[[Row, int], None] | None = None,
) -> int:
    """Measures the plans that `path` (NAME.jsonl) lacks, in their order; -> how many are still missing.

    One row is measured at least; another begins where the budget holds as long as the longest so far took (0: no
    limit). Every row is on disk before the next one starts, and a signal ends it between two of them. A row that
    does not come about (its loss is not finite) is passed over, and named in the end.
    Raises ResultsError for a row that stands there with another configuration, for a folder that cannot be
    written to, and for what was passed over.
    """
    plans, budget, longest = list(plans), Budget(budget_minutes), 0.0
    missing, failed = _missing(plans, path), []
    _writable(path.parent)
    with keep_images(), _stopped_by_signals():
        while missing and (not longest or budget.allows(longest)):
            planned, started = missing.pop(0), time.monotonic()
            try:
                row, arrays = measured(planned)
            except Stopped:
                missing.insert(0, planned)
                break
            except (FloatingPointError, ResultsError) as error:
                failed.append(f"{planned.row}, seed {planned.config.run.seed}: {error}")
                continue
            with _alone(path.parent):  # another process may be measuring the same
                if row.key not in {old.key for old in _rows(path)}:
                    if arrays:  # first, so that no row stands without what it promises
                        keep_arrays(path.with_suffix(".safetensors"), row.row, row.seed, arrays)
                    append_row(path, row)
            longest = max(longest, time.monotonic() - started)
            if report:
                report(row, len(missing))
    if failed:
        raise ResultsError("not measured: " + "; ".join(failed))
    return len(missing)


def _rows(path: Path) -> list[Row]:
    return read_rows(path.stem, path.parent) if path.exists() else []


def _missing(plans: list[Planned], path: Path) -> list[Planned]:
    stored = {row.key: row for row in _rows(path)}
    for planned in plans:
        if row := stored.get(planned.key):
            try:
                was = from_json(TrainConfig, json.dumps(row.config))
            except ConfigError:  # of before an option was renamed: the row stays, with its commit
                continue
            if apart := differences(planned.config, was):
                raise ResultsError(
                    f"{path} has {planned.row!r}, seed {row.seed}, of another configuration: {'; '.join(apart)}; "
                    "use another folder, or remove the row"
                )
    return [planned for planned in plans if planned.key not in stored]


def _writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial = folder / f".trial.{os.getpid()}"
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise ResultsError(f"{folder} cannot be written to: {error.strerror}; give another folder") from None


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)  # released on closing
        yield
    finally:
        os.close(handle)


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Raises Stopped at a signal, for whatever does not hear signals by itself as training does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _) -> None:
        raise Stopped(signal.Signals(number).name)

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
