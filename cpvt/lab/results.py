"""Measured results, one JSON line each, read as a pandas DataFrame; and the published figures beside them.

A result is found by its columns, never by a name:

    rows = read("photographs")
    select(rows, encoding="peg", global_pool="avg")["top1@8"]

A metric's name carries its resolution in tokens behind @ and its part behind /: `top1@14`, `top1@10x20`,
`top1@14/d3` (at distance 3), `images_per_s`. Accuracies are in percent.
"""

import dataclasses
import fcntl
import hashlib
import json
import math
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy
import pandas
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from cpvt.config import format_encoding, parse_encoding
from cpvt.errors import ResultsError, nearest

# The columns of each experiment, and the value that a row has unless it says another (None: it must say one).
# encoding, global_pool, stem, ... are fields of the configuration; max_steps is optim.steps, since the metric
# `steps` says how many were made; `again` marks the second model without encoding that a stop-watch is tried on.
_SYNTHETIC = {"task": None, "encoding": None, "global_pool": "token"}
_HEADS = {"distilled": False, "teacher": ""}
_MODEL = {"encoding": None, "stem": "patch", "global_pool": "token", "mlp_only_blocks": 0}
COLUMNS: dict[str, dict[str, Any]] = {
    "synthetic": _SYNTHETIC,
    "padding": _SYNTHETIC,
    "pictures": _SYNTHETIC,
    "pooling": {**_SYNTHETIC, "max_steps": 500},
    "pipelines": {"pipeline": None},
    "pilot": {**_MODEL, "lr": None, "epochs": None},
    "precision": {"encoding": None, "precision": None},
    "baselines": {"baseline": None, "grid": 8},
    "photographs": {**_MODEL, **_HEADS, "shifted": False, "grid": 8},
    "live": {"encoding": None},
    "costs": {**_MODEL, "again": False},
    "benchmark": {"part": None, "model": "", "mode": "", "loader": "", "size": 0},
}
NOT_YET = "not yet measured"
DATA = Path(__file__).resolve().parents[2] / "data"  # the repository's, wherever the working directory is
_METRIC = re.compile(r"[a-z][a-z0-9_]*(@\d+(x\d+)?)?(/[a-z][a-z0-9_.-]*)*")


class AlreadyMeasured(ResultsError):
    """A result of the same experiment, scale, columns and seed stands in the file."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One measurement of one trained (or untrained) model.

    experiment      which question: "synthetic", "tables"
    columns         which row of its table: {"task": "where", "encoding": "peg", "global_pool": "avg"}
    scale           "seconds", "minutes" or "hours"
    dataset         name of the data, and `dataset_sha256` of what was evaluated on
    config          the whole configuration, as `dataclasses.asdict` gives it
    metrics         name -> number; see above for the names
    seconds         what it took, training and evaluation together
    device, torch   where it ran, and the version
    cpvt_commit     `commit()`, asked before training
    date            ISO 8601

    Raises ResultsError where a value cannot be.
    """

    experiment: str
    columns: dict[str, str | int | float | bool]
    scale: str
    dataset: str
    dataset_sha256: str
    seed: int = 0
    config: dict[str, Any]
    metrics: dict[str, float]
    seconds: float
    device: str
    cpvt_commit: str
    torch: str = str(torch.__version__)
    date: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def __post_init__(self):
        def expect(field: str, fine: Any, expected: str) -> None:
            if not fine:
                raise ResultsError(f"{field}={getattr(self, field)!r}; expected {expected}")

        for name in ("experiment", "scale", "dataset", "device", "cpvt_commit", "torch", "date"):
            expect(name, isinstance(getattr(self, name), str), "text")
        own, sha256 = COLUMNS.get(self.experiment, self.columns), str(self.dataset_sha256)
        expect("dataset_sha256", re.fullmatch("[0-9a-f]{64}", sha256), "64 hex digits")
        expect("seed", type(self.seed) is int and self.seed >= 0, "a whole number, 0 or more")
        for name in ("columns", "config", "metrics"):
            value = getattr(self, name)
            expect(name, isinstance(value, dict) and value, "at least one name and value")
        plain = all(isinstance(value, str | int | float) for value in self.columns.values())
        fine = plain and self.columns.keys() == own.keys() and not own.keys() & {*FIELDS, *self.metrics}
        expect("columns", fine, f"those of {self.experiment}: {', '.join(own)}; no field, no metric")
        for name, value in self.metrics.items():
            _check_metric(name, value)
        object.__setattr__(self, "columns", {name: self.columns[name] for name in own})  # in one order
        try:  # JSON has no tuples: a result must equal what is read back
            object.__setattr__(self, "config", json.loads(json.dumps(self.config, allow_nan=False)))
            json.dumps([self.columns, self.seconds], allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ResultsError(f"config, columns or seconds: not JSON ({error}); give plain values") from None

    @property
    def key(self) -> tuple:
        """What may stand only once in a file."""
        return self.experiment, self.scale, tuple(self.columns.items()), self.seed

    @property
    def label(self) -> str:
        return describe(self.columns, seed=self.seed)


FIELDS = tuple(field.name for field in dataclasses.fields(Result))


def describe(columns: dict[str, Any], **more: Any) -> str:
    """Columns in one line: "encoding=peg, global_pool=avg, seed=0"."""
    return ", ".join(f"{name}={value}" for name, value in {**columns, **more}.items())


def complete(experiment: str, columns: dict[str, Any]) -> dict[str, Any]:
    """Columns of a row -> all of them: one that is not named has its usual value, an encoding its one spelling.

    A column that has no usual value and is not named is left out.
    """
    usual = COLUMNS.get(experiment, columns)
    if unknown := [name for name in columns if name not in usual]:
        raise ResultsError(f"{experiment} has no column {unknown[0]!r}; {nearest(unknown[0], usual)}")
    full = {**usual, **columns}
    if "encoding" in columns:
        full["encoding"] = format_encoding(parse_encoding(columns["encoding"]))
    return {name: value for name, value in full.items() if value is not None}


def _check_metric(name: Any, value: Any) -> None:
    percent = str(name).startswith(("top1", "top5"))
    if not isinstance(name, str) or not _METRIC.fullmatch(name) or (percent and "@" not in name):
        raise ResultsError(f"metric {name!r}; expected a name such as top1@14, top1@14/d3 or images_per_s")
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or (percent and not 0 <= value <= 100):
        raise ResultsError(f"metric {name}={value!r}; expected a finite number; of top1 in percent, 0 to 100")


# --------------------------------------------------------------------------- writing and reading


def results_folder(folder: str | Path | None = None) -> Path:
    """Where results are written to and read from: the folder that is given, else the repository's data/results."""
    if folder is None and not DATA.is_dir():
        raise ResultsError(f"there is no {DATA}: name a folder for results, or work in a clone of the book")
    return DATA / "results" if folder is None else Path(folder)


def check_writable(folder: str | Path | None = None) -> None:
    """Raises ResultsError for a folder that results could not be written to; before hours of measuring."""
    path = results_folder(folder)
    there = next(place for place in (path, *path.parents) if os.path.lexists(place))
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise ResultsError(f"{path} cannot be written to; give another folder")


def append(
    result: Result,
    folder: str | Path | None = None,
    again: bool = False,
    arrays: dict[str, Tensor] | None = None,
) -> None:
    """Appends a result as one line to EXPERIMENT.jsonl of the folder, whole or not at all, its arrays first.

    A second one with its key raises AlreadyMeasured, unless `again`: then the older line stays as history and
    `read` gives the newer. Raises ResultsError for other reasons too; the file is then as it was.
    """
    folder = results_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result.experiment}.jsonl"
    line = (json.dumps(dataclasses.asdict(result), allow_nan=False) + "\n").encode()
    with path.open("ab+", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released on closing; a reader of half a line would refuse it
        size = file.seek(0, os.SEEK_END)
        if size and os.pread(file.fileno(), 1, size - 1) != b"\n":
            raise ResultsError(f"{path}: the last line is cut off; complete or remove it")
        if not again and any(result.key == old.key for old in _lines(path)):
            raise AlreadyMeasured(f"{path} has {result.label}; remove it, or pass again=True to supersede it")
        if arrays:  # first, so that no row stands without what it promises
            _keep_arrays(result, folder, arrays)
        if file.write(line) < len(line):  # the disk is full
            file.truncate(size)
            raise ResultsError(f"{path}: no space left for a row of {len(line)} bytes; nothing was written")
        os.fsync(file)


def recorded(experiment: str | None = None, folder: str | Path | None = None) -> list[Result]:
    """The results of an experiment, or all; of superseded ones only the newest. See `read`."""
    folder = results_folder(folder)
    if not folder.is_dir():
        raise ResultsError(f"there is no folder {folder}")
    if experiment not in (None, *COLUMNS) and not (folder / f"{experiment}.jsonl").exists():
        raise ResultsError(f"no experiment {experiment!r}; {nearest(experiment, COLUMNS)}")
    paths = sorted(folder.glob("*.jsonl" if experiment is None else f"{experiment}.jsonl"))
    return list({result.key: result for path in paths for result in _lines(path)}.values())


def _lines(path: Path) -> Iterator[Result]:
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            values = json.loads(line)
            if not isinstance(values, dict) or values.keys() != set(FIELDS):
                raise ResultsError(
                    f"got {str(values)[:60]!r}; a result has {', '.join(FIELDS)}, and nothing else"
                )
            if values["experiment"] != path.stem:
                raise ResultsError(f"experiment {values['experiment']!r}: it belongs into another file")
            yield Result(**values)
        except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, not a result
            raise ResultsError(f"{path}:{number}: {error}; mend or remove the line") from None


def read(experiment: str | None = None, folder: str | Path | None = None) -> pandas.DataFrame:
    """The results of an experiment, or of all, a row each.

    Columns: experiment, those of the experiment, seed, the other fields, then the metrics (NaN where a row lacks
    one). An experiment that nobody has measured yet gives no row, and the same columns. Raises ResultsError naming
    file and line.
    """
    results = recorded(experiment, folder)
    own = dict.fromkeys(COLUMNS.get(experiment, {})) | dict.fromkeys(n for r in results for n in r.columns)
    fields = [name for name in FIELDS if name not in ("experiment", "columns", "seed", "metrics")]
    metrics = dict.fromkeys(name for result in results for name in result.metrics)
    records = [{**vars(result), **result.columns, **result.metrics} for result in results]
    return pandas.DataFrame(records, columns=["experiment", *own, "seed", *fields, *metrics])


def select(rows: pandas.DataFrame, **columns: Any) -> pandas.DataFrame:
    """The rows that have these columns; those not named have their usual value (see `COLUMNS`), if there is one.

    So select(rows, encoding="peg") leaves out what was pooled, distilled or trained longer. All of them:
    rows[rows.encoding == "peg"].
    """
    fits = numpy.ones(len(rows), dtype=bool)
    for experiment in rows["experiment"].unique():
        others = (rows["experiment"] != experiment).to_numpy()
        for name, value in complete(experiment, columns).items():
            fits &= others | (rows[name] == value).to_numpy()
    return rows[fits]


def commit() -> str:
    """The package's git commit; with "-dirty" where files of the package differ from it; "unknown" without git,
    unless CPVT_COMMIT says which it is (where a copy of the files runs)."""
    if told := os.environ.get("CPVT_COMMIT"):
        return told
    git = ["git", "-C", str(Path(__file__).resolve().parents[1])]
    asked = ["rev-parse", "HEAD"], ["status", "--porcelain", "--", "*.py"]
    try:
        said = [subprocess.run([*git, *words], capture_output=True, text=True, check=True) for words in asked]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return said[0].stdout.strip() + ("-dirty" if said[1].stdout else "")


def device_name(device: str | torch.device) -> str:
    """As rows say it: "cpu", or what the GPU calls itself."""
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "cpu"


def fingerprint(*tensors: Tensor) -> str:
    """SHA-256 over the shapes, types and bytes of tensors: the `dataset_sha256` of data that was drawn."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


# --------------------------------------------------------------------------- small arrays beside the results
# EXPERIMENT.safetensors, under keys such as {"encoding": "peg", ..., "seed": 0}/correct


def _keep_arrays(result: Result, folder: Path, arrays: dict[str, Tensor]) -> None:
    path = folder / f"{result.experiment}.safetensors"
    try:
        held = load_file(path) if path.exists() else {}
    except SafetensorError as error:
        raise ResultsError(f"{path} is damaged ({error}); restore or remove it") from None
    of_whom = json.dumps({**result.columns, "seed": result.seed})
    held |= {f"{of_whom}/{name}": array.contiguous() for name, array in arrays.items()}
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(held, beside)
        os.replace(beside, path)  # as a whole: nobody reads half a file
    finally:
        beside.unlink(missing_ok=True)


def read_arrays(
    experiment: str, name: str, folder: str | Path | None = None, **columns: Any
) -> dict[int, Tensor]:
    """-> the arrays called `name` of a row, by seed; {} where none were kept. Columns as in `select`.

    `name`: see `metrics.arrays_of`. "correct" comes as it is kept; `unpack` makes booleans of it.
    """
    path = results_folder(folder) / f"{experiment}.safetensors"
    if not path.exists():
        return {}
    found, wanted = {}, complete(experiment, columns)
    try:
        with safe_open(path, "pt") as file:
            for key in file.keys():
                of_whom, _, what = key.rpartition("/")
                own = json.loads(of_whom)
                if what == name and wanted.items() <= own.items():
                    found[own["seed"]] = file.get_tensor(key)
    except (SafetensorError, ValueError, AttributeError, KeyError) as error:  # or it holds other things
        raise ResultsError(f"{path} is damaged ({error}); restore or remove it") from None
    return dict(sorted(found.items()))


def unpack(correct: Tensor, images: int) -> Tensor:
    """The array "correct" -> (images,) booleans. Raises ResultsError where it is of another number of images."""
    if len(correct) != -(-images // 8):
        raise ResultsError(f"{len(correct)} bytes for {images} images; expected {-(-images // 8)}")
    return torch.from_numpy(numpy.unpackbits(correct.numpy(), count=images)).bool()


# --------------------------------------------------------------------------- published


def published(table: str | None = None) -> pandas.DataFrame:
    """The published figures of a table, or all, as data/published.csv has them; data/README.md has the columns."""
    rows = pandas.read_csv(DATA / "published.csv", keep_default_na=False)
    if table not in (None, *rows["table"]):
        raise ResultsError(f"no published table {table!r}; {nearest(table, set(rows['table']))}")
    return rows if table is None else rows[rows["table"] == table].reset_index(drop=True)
