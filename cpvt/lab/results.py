"""Measured rows: one JSON line each, checked on the way in and out; and the published ones beside them.

A metric's name carries its resolution in tokens behind @ and its part behind /: `top1@14`, `top1@10x20`,
`top1@14/d3` (at distance 3), `images_per_s`. Accuracies are in percent.
"""

from __future__ import annotations

import csv
import dataclasses
import fcntl
import hashlib
import json
import math
import os
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from torch import Tensor

from cpvt.errors import ResultsError

NOT_YET = "not yet measured"
_METRIC = re.compile(r"[a-z][a-z0-9_]*(@\d+(x\d+)?)?(/[a-z][a-z0-9_.-]*)*")
_PERCENT = ("top1", "top5")


# --------------------------------------------------------------------------- measured


@dataclass(frozen=True)
class Row:
    """One measurement of one trained (or untrained) model.

    experiment      which question: "diagnostics", "placement"
    row             which line of its table: "where, peg, gap"
    scale           "seconds", "minutes" or "hours"
    dataset         name of the data, and `dataset_sha256` of what was evaluated on
    config          the whole configuration, as `dataclasses.asdict` gives it
    metrics         name -> number; see above for the names
    weights         "raw" or "ema"
    seconds         what the row took, training and evaluation together
    device, torch   where it ran, and the version
    cpvt_commit     `commit()`
    date            ISO 8601

    Raises ResultsError where a value has the wrong type or cannot be.
    """

    experiment: str
    row: str
    scale: str
    dataset: str
    dataset_sha256: str
    seed: int
    config: dict[str, Any]
    metrics: dict[str, float]
    weights: str
    seconds: float
    device: str
    torch: str
    cpvt_commit: str
    date: str

    def __post_init__(self):
        def expect(field: str, fine: bool, expected: str) -> None:
            if not fine:
                raise ResultsError(f"{field}={getattr(self, field)!r}; expected {expected}")

        for field in ("experiment", "row", "scale", "dataset", "device", "torch", "cpvt_commit"):
            value = getattr(self, field)
            expect(field, isinstance(value, str) and value.strip() != "", "words")
        sha = self.dataset_sha256
        expect(
            "dataset_sha256",
            isinstance(sha, str) and bool(re.fullmatch("[0-9a-f]{64}", sha)),
            "64 hex digits",
        )
        expect("seed", type(self.seed) is int and self.seed >= 0, "a whole number, 0 or more")
        expect("weights", self.weights in ("raw", "ema"), "'raw' or 'ema'")
        expect("seconds", _number(self.seconds) and self.seconds >= 0, "a finite number, 0 or more")
        expect("config", isinstance(self.config, dict), "a dictionary")
        expect(
            "metrics", isinstance(self.metrics, dict) and bool(self.metrics), "at least one name and number"
        )
        try:
            datetime.fromisoformat(self.date)
        except (TypeError, ValueError):
            raise ResultsError(f"date={self.date!r}; expected ISO 8601, as in 2026-01-31T12:00:00") from None
        for name, value in self.metrics.items():
            _check_metric(name, value)
        try:  # JSON has no tuples: a row must equal what is read back
            object.__setattr__(self, "config", json.loads(json.dumps(self.config, allow_nan=False)))
        except (TypeError, ValueError) as error:
            raise ResultsError(f"config: cannot be written as JSON ({error}); give plain values") from None

    @property
    def key(self) -> tuple[str, str, str, int]:
        """What may stand only once in a file."""
        return self.experiment, self.row, self.scale, self.seed

    @property
    def encoding(self) -> str:
        """The model's encoding, as text; raises ResultsError where the configuration holds none."""
        for holder in (self.config.get("model"), self.config):
            if isinstance(holder, dict) and isinstance(holder.get("encoding"), str):
                return holder["encoding"]
        raise ResultsError(f"row {self.row!r}: its config has no model.encoding")


FIELDS = tuple(field.name for field in dataclasses.fields(Row))


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_metric(name: Any, value: Any) -> None:
    if not isinstance(name, str) or not _METRIC.fullmatch(name):
        raise ResultsError(f"metric {name!r}; expected a name such as top1@14, top1@14/d3 or images_per_s")
    if not _number(value):
        raise ResultsError(f"metric {name}={value!r}; expected a finite number")
    kind = re.split("[@/]", name)[0]
    if kind in _PERCENT:
        if "@" not in name:
            raise ResultsError(
                f"metric {name!r} without a resolution; write the tokens a side, as in {kind}@14"
            )
        if not 0 <= value <= 100:
            raise ResultsError(f"metric {name}={value!r}; expected percent, 0 to 100")


def append_row(path: str | Path, row: Row, again: bool = False) -> None:
    """Append `row` to the file as one line, whole or not at all.

    A row with the same experiment, row, scale and seed is refused, unless `again`: then the older line stays
    as history and `read_rows` gives the newer. Raises ResultsError; the file is then as it was.
    """
    path = Path(path)
    if not isinstance(row, Row):
        raise ResultsError(f"append_row was given {type(row).__name__}; expected a Row")
    path.parent.mkdir(parents=True, exist_ok=True)
    line = (json.dumps(dataclasses.asdict(row), allow_nan=False) + "\n").encode()
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        # Released on closing; a reader of a half-written line would refuse it.
        fcntl.flock(handle, fcntl.LOCK_EX)
        size = os.fstat(handle).st_size
        if size and os.pread(handle, 1, size - 1) != b"\n":
            raise ResultsError(f"{path}: the last line is cut off; complete or remove it")
        if not again and any(row.key == old.key for old in _read(path)):
            raise ResultsError(f"{path} has {row.key} already; remove it, or pass again=True to supersede it")
        if os.write(handle, line) < len(line):  # the disk is full
            os.ftruncate(handle, size)
            raise ResultsError(f"{path}: no space left for a row of {len(line)} bytes; nothing was written")
        os.fsync(handle)
    finally:
        os.close(handle)


def read_rows(experiment: str | None = None, folder: str | Path = "data/results") -> list[Row]:
    """The rows of an experiment, or all, out of `folder`/*.jsonl; of superseded ones only the newest.

    A relative folder is looked for from the package and from the working directory upwards. An experiment
    without rows gives [], which the text forms below call "not yet measured". Raises ResultsError naming
    file and line.
    """
    rows: dict[tuple, Row] = {}
    for path in sorted(find(folder).glob("*.jsonl")):
        for row in _read(path):
            rows.pop(row.key, None)
            rows[row.key] = row
    return [row for row in rows.values() if experiment in (None, row.experiment)]


def _read(path: Path) -> Iterable[Row]:
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            values = json.loads(line)
            if not isinstance(values, dict):
                raise ResultsError(f"expected an object, got {line[:40]!r}")
            if missing := [name for name in FIELDS if name not in values]:
                raise ResultsError(f"no {', '.join(missing)}; a row has {', '.join(FIELDS)}")
            if extra := [name for name in values if name not in FIELDS]:
                raise ResultsError(f"unknown {', '.join(extra)}; a row has {', '.join(FIELDS)}")
            yield Row(**values)
        except json.JSONDecodeError as error:
            raise ResultsError(f"{path}:{number}: not JSON ({error}); mend or remove the line") from None
        except ResultsError as error:
            raise ResultsError(f"{path}:{number}: {error}") from None


def find(wanted: str | Path) -> Path:
    """A file or folder of the repository, from the package or the working directory upwards."""
    here = [Path(__file__).resolve().parent, Path.cwd()]
    for start in here:
        for folder in (start, *start.parents):
            if (folder / wanted).exists():
                return folder / wanted
    raise ResultsError(
        f"{wanted} was not found above {here[0]} or {here[1]}; work inside a clone of the book"
    )


def commit() -> str:
    """The package's git commit; with "-dirty" where files of the package differ from it.

    "unknown" where the package lies outside a git repository.
    """
    package = Path(__file__).resolve().parents[1]

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(package), *words], capture_output=True, text=True, check=True
        ).stdout

    try:
        found = git("rev-parse", "HEAD").strip()
        return found + ("-dirty" if git("status", "--porcelain", "--", "*.py").strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def fingerprint(*tensors: Tensor) -> str:
    """SHA-256 over the shapes, types and bytes of tensors: the `dataset_sha256` of data that was drawn."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


# --------------------------------------------------------------------------- over seeds


@dataclass(frozen=True)
class Spread:
    """Values over seeds: mean, extremes, from three values on a 95 % interval of the mean (Student's t)."""

    mean: float
    min: float
    max: float
    n: int
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.n == 1:
            return f"{self.mean:.1f} (one seed)"
        if self.low is None:
            return f"{self.mean:.1f} ({self.min:.1f} to {self.max:.1f}, {self.n} seeds)"
        return f"{self.mean:.1f} ± {self.high - self.mean:.1f} ({self.n} seeds)"


def spread(values: Sequence[float]) -> Spread:
    """Numbers, one a seed -> their Spread. Raises ResultsError without any."""
    values = [float(v) for v in values]
    if not values:
        raise ResultsError("the spread of no values; expected one a seed")
    mean, n = fmean(values), len(values)
    if n < 3:
        return Spread(mean, min(values), max(values), n)
    half = t_quantile(n - 1) * stdev(values) / math.sqrt(n)
    return Spread(mean, min(values), max(values), n, mean - half, mean + half)


def t_quantile(freedom: int, inside: float = 0.95) -> float:
    """The t beyond which, on both sides together, Student's distribution holds 1 - `inside`.

    From the finite sums of Abramowitz and Stegun, 26.7.3 and 26.7.4, inverted by bisection.
    """
    if freedom < 1 or not 0 < inside < 1:
        raise ResultsError(f"t_quantile({freedom}, {inside}); expected 1 or more, and a share below 1")

    def share(angle: float) -> float:
        cos, sin, odd = math.cos(angle), math.sin(angle), freedom % 2
        term, total = (cos if odd else 1.0), 0.0
        for k in range(freedom // 2):
            total += term
            term *= cos * cos * (2 * k + 1 + odd) / (2 * k + 2 + odd)
        return 2 / math.pi * (angle + sin * total) if odd else sin * total

    low, high = 0.0, math.pi / 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if share(middle) < inside else (low, middle)
    return math.tan(low) * math.sqrt(freedom)


def over_seeds(rows: Iterable[Row], metric: str) -> dict[str, Spread]:
    """Row name -> Spread of `metric` over its seeds, in the order of the rows; without it, left out."""
    values: dict[str, dict[tuple, float]] = {}
    for row in rows:
        if metric in row.metrics:
            values.setdefault(row.row, {})[row.key] = row.metrics[metric]
    return {name: spread(list(found.values())) for name, found in values.items()}


def difference(rows: Iterable[Row], first: str, second: str, metric: str) -> Spread | None:
    """The Spread of `first` minus `second`, paired by seed; None while no seed has both. Raises ResultsError where
    the two were evaluated on different images."""
    found: dict[str, dict[tuple, Row]] = {first: {}, second: {}}
    for row in rows:
        if row.row in found and metric in row.metrics:
            found[row.row][row.experiment, row.scale, row.seed] = row
    both = [(row, found[second][key]) for key, row in found[first].items() if key in found[second]]
    for pair in both:
        same_images(pair)
    return spread([one.metrics[metric] - other.metrics[metric] for one, other in both]) if both else None


def same_images(rows: Iterable[Row]) -> None:
    """Raises ResultsError unless all rows were evaluated on the same images."""
    if len({row.dataset_sha256 for row in rows}) > 1:
        names = " and ".join(f"{row.row!r} ({row.dataset_sha256[:8]})" for row in rows)
        raise ResultsError(f"{names} were evaluated on different images: measure both on the same")


# --------------------------------------------------------------------------- published


@dataclass(frozen=True)
class Published:
    """One published figure, as data/published.csv has it. `name` says which line of its table it is."""

    table: str
    model: str
    encoding: str
    setting: str
    metric: str
    value: float
    unit: str
    source: str
    provenance: str

    @property
    def name(self) -> str:
        return ", ".join(part for part in (self.model, self.encoding, self.setting) if part)


PROVENANCES = ("official figure", "secondary", "digitised")
_COLUMNS = [field.name for field in dataclasses.fields(Published)]


def published(table: str | None = None, path: str | Path = "data/published.csv") -> list[Published]:
    """The published figures of a table, or all. Raises ResultsError naming the line, or the known tables."""
    path, rows = find(path), []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != _COLUMNS:
            raise ResultsError(f"{path}:1: columns {reader.fieldnames}; expected {_COLUMNS}")
        for values in reader:
            line = f"{path}:{reader.line_num}"
            try:
                row = Published(**{**values, "value": float(values["value"])})
            except (TypeError, ValueError) as error:
                raise ResultsError(f"{line}: {error}; expected {len(_COLUMNS)} cells") from None
            if row.provenance not in PROVENANCES:
                raise ResultsError(f"{line}: provenance {row.provenance!r}; use {PROVENANCES}")
            rows.append(row)
    tables = sorted({row.table for row in rows})
    if table not in (None, *tables):
        raise ResultsError(f"no published table {table!r}; there are {', '.join(tables)}")
    return [row for row in rows if table in (None, row.table)]


@dataclass(frozen=True)
class Beside:
    """One line: what was measured here and what was published. Either may be missing, and then says so."""

    name: str
    measured: Spread | None
    published: Published | None

    def texts(self) -> tuple[str, str, str]:
        """(name, measured, published), ready for a table."""
        cited = f"{self.published.value:g} {self.published.unit}" if self.published else "not published"
        return self.name, str(self.measured) if self.measured else NOT_YET, cited


def beside(
    rows: Iterable[Row], published: Iterable[Published], metric: str, match: dict[str, str] | None = None
) -> list[Beside]:
    """Published lines, each with the measured row that stands for it; then measured rows that none asks for.

    `match`: row name -> published name; without an entry the two are the same. `metric`: the measured one.
    """
    measured = over_seeds(rows, metric)
    names = {(match or {}).get(name, name): name for name in measured}
    lines = [Beside(line.name, measured.pop(names.get(line.name, ""), None), line) for line in published]
    return lines + [Beside(name, found, None) for name, found in measured.items()]
