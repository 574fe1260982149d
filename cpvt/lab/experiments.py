"""Experiments as lists of configurations; `run_missing` measures what is missing and appends a row for each.

`diagnostics`: every encoding on the synthetic *where*, *arrangement* and *what*, with class token and with
pooling, three seeds, minutes on a CPU core a row at most. `paddings`: *where* with every padding of a PEG, as
long a row. `readouts`: what the matrix hints at of class token and pooling, on fresh seeds, as long a row or four
times that. `pipelines`: one configuration trained on real images through this package's data pipeline and through
timm's, three seeds each, minutes a row on a core. `tables`: every row of the paper's tables on the 1:8 scale
model, minutes a row on a GPU; `tuning` beforehand: its rate. `fashion`: the rows that a CPU can afford, on
Fashion-MNIST; `fashion-tuning` beforehand; `fashion-length`: four of them, shorter and longer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from inspect import signature
from pathlib import Path

import torch

from cpvt.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from cpvt.data.loader import normalise
from cpvt.data.synthetic import draw
from cpvt.errors import ConfigError, nearest
from cpvt.lab.arrays import arrays_of
from cpvt.lab.fashion import lengths, score_fashion
from cpvt.lab.fashion import rows as fashion_rows
from cpvt.lab.fashion import tuning as fashion_tuning_rows
from cpvt.lab.metrics import score_tuning, spread_images
from cpvt.lab.pipelines import PIPELINES, pipeline, score_pipeline
from cpvt.lab.results import Row, fingerprint
from cpvt.lab.runner import Planned, measure_missing, rooted
from cpvt.lab.tables import FIVE, TABLES, rows, score_scale
from cpvt.lab.tables import SEEDS as TABLE_SEEDS
from cpvt.lab.tables import tuning as tuning_rows
from cpvt.training.evaluate import correct
from cpvt.training.train import Run

# The grids are as small as the questions allow: distances 0-4 to the border, separations 2-9 with two rows and
# columns of margin, and two places on either side for the bars of *what*.
GRIDS = {"where": (10, 10), "arrangement": (6, 14), "what": (8, 12)}
CHANCE = {"where": 25.0, "arrangement": 50.0, "what": 50.0}
ENCODINGS = (
    "none",
    "learned",
    "sine",
    "relative",
    "relative(wrap=True)",
    "rotary",
    "peg",
    "peg(positions=(0, 1))",
    "peg(positions=(-1, 0, 1))",
    "peg(positions=(0, 1, 2, 3, 4))",
    "peg(kernel=5)",
    "peg(kernel=7)",
    "peg(positions=(-1,), kernel=27, compute='matrix')",
    "learned + peg",
)
READOUTS = ("token", "avg")
SEEDS = (0, 1, 2)


def diagnostic(task: str, encoding: str, global_pool: str = "token", seed: int = 0, **optim) -> TrainConfig:
    """The configuration of one diagnostic run: one pixel a token, three blocks of width 32.

    Five PEGs after blocks 0-4 need six blocks; all else is the same for every encoding.
    """
    if task not in GRIDS:
        raise ConfigError(f"no diagnostic {task!r}; {nearest(task, GRIDS)}")
    depth = 6 if "3, 4" in encoding else 3
    return TrainConfig(
        # DeiT's 0.02 suits widths from 192 on; with it a width of 32 hardly moves at first.
        model=ModelConfig(
            image_size=GRIDS[task],
            patch_size=1,
            num_classes=4 if task == "where" else 2,
            width=32,
            depth=depth,
            heads=1,
            mlp_ratio=2.0,
            encoding=encoding,
            global_pool=global_pool,
            init_std=0.1,
        ),
        data=DataConfig(name=task, grid=GRIDS[task], train_size=1 << 16, test_size=512),
        optim=replace(
            OptimConfig(
                global_batch_size=32, steps=500, lr=3e-3, warmup_steps=30, min_lr=1e-5, stop_loss=0.01
            ),
            **optim,
        ),
        run=RunConfig(seed=seed, device="cpu", log_every=100),
    )


def measure_diagnostic(run: Run, images: int = 256) -> tuple[dict[str, float], list[torch.Tensor]]:
    """-> metrics in percent, by distance where the task has one, and the images that they were taken on.

    *what* has instead `/trained` (the side that bars were trained on), `/unseen` (the other side) and
    `/diagonals` (the pair that was trained everywhere).
    """
    data = run.config.data
    size = "x".join(map(str, sorted(set(data.grid), key=data.grid.index)))
    seen: list[torch.Tensor] = []

    def score(split: str, **options) -> float:
        sample = draw(
            data.name, range(images), grid=data.grid, seed=run.config.run.seed, split=split, **options
        )
        seen.append(sample.images)
        return 100 * correct(run.model, normalise(sample.images), sample.labels).float().mean().item()

    metrics = {f"top1@{size}": score("val")}
    if data.name == "what":
        metrics[f"top1@{size}/trained"] = metrics[f"top1@{size}"]
        metrics[f"top1@{size}/unseen"] = score("test")
        metrics[f"top1@{size}/diagonals"] = score("val", pair="diagonals")
        return metrics, seen
    distances = range(data.grid[0] // 2) if data.name == "where" else range(2, data.grid[1] - 4)
    for distance in distances:
        metrics[f"top1@{size}/d{distance}"] = score("val", distances=(distance,))
    return metrics, seen


def score_diagnostic(run: Run) -> tuple[dict[str, float], str, str]:
    """`measure_diagnostic` for a row: metrics, the diagnostic's name, and the SHA-256 of the drawn images."""
    metrics, images = measure_diagnostic(run)
    return metrics, run.config.data.name, fingerprint(*images)


def diagnostics(
    tasks: Iterable[str] = tuple(GRIDS),
    encodings: Iterable[str] = ENCODINGS,
    readouts: Iterable[str] = READOUTS,
    seeds: Iterable[int] = SEEDS,
) -> Iterator[Planned]:
    """The full matrix, first seeds first, so that a run cut short leaves a whole table."""
    encodings, tasks = list(encodings), list(tasks)
    for seed in seeds:
        for global_pool in readouts:
            for encoding in encodings:
                for task in tasks:
                    config = diagnostic(task, encoding, global_pool, seed)
                    name = f"{task}, {config.model.encoding}, {global_pool}"
                    yield Planned("diagnostics", name, "seconds", config, score_diagnostic)


# What stands beyond the border, the same without the skip (which no padding has to drop), and the border alone.
PADDINGS = (
    "peg(padding='none', skip=False)",
    "peg(skip=False)",
    "peg(padding='replicate')",
    "peg(padding='reflect')",
    "peg(padding='circular')",
    "peg(on='constant')",
)


def paddings(seeds: Iterable[int] = SEEDS) -> Iterator[Planned]:
    """*Where* with every padding of one PEG, read out by the class token.

    `diagnostics` has zero padding with its skip.

    Written before these rows, after a pilot of no padding (42 at 300 steps) and of circular (25): no accuracy at
    any distance is above the ceiling of a reach of 1 for no padding, zeros and reflect, of 0 for replicate and for
    the border alone, of nothing for circular; and without padding the place is learnt at both visible distances.
    """
    for plan in diagnostics(("where",), PADDINGS, ("token",), seeds):
        yield replace(plan, experiment="paddings")


HINTS = (("what", "sine"), ("where", FIVE))


def readouts(
    seeds: Iterable[int] = range(3, 8), long: Iterable[int] = range(3, 6), repeated: Iterable[int] = SEEDS
) -> Iterator[Planned]:
    """Class token against pooling where the rows of `diagnostics` hint at a difference.

    On seeds that had no say in the choice; then pooled five PEGs on *where* with four times the steps, on the
    seeds `long`.

    Written before these rows, after a look at those of `diagnostics` (three seeds, 42 differences): with five
    PEGs pooling is behind on *where*; with sine it is ahead on the unseen side of *what*; and five PEGs with
    pooling solve *where* (95 % and more in every seed) given 2000 steps, since their reach allows it.

    Afterwards, since claim and fresh seeds did not agree: the three runs that had hinted at it, `repeated` with
    the same seeds and configuration.
    """
    for seed in seeds:
        for task, encoding in HINTS:
            for plan in diagnostics((task,), (encoding,), READOUTS, (seed,)):
                yield replace(plan, experiment="readouts")
    for seed in long:
        config = diagnostic("where", FIVE, "avg", seed, steps=2000)
        name = f"where, {FIVE}, avg, 2000 steps"
        yield Planned("readouts", name, "seconds", config, score_diagnostic)
    for plan in diagnostics(("where",), (FIVE,), ("avg",), repeated):
        yield replace(plan, experiment="readouts")


# --------------------------------------------------------------------------- real images


def pipelines(seeds: Iterable[int] = SEEDS) -> Iterator[Planned]:
    """Tiny-ImageNet's first twenty classes through this package's pipeline and through timm's loader.

    All else is the same: model and first weights, loss, optimiser, steps, and evaluation. What differs is who
    draws the recipe's chances and who computes the pixels.

    Written before the first run: no difference is expected. The means of three seeds will differ by less than
    twice the standard error of their difference, or by less than 1.5 points of top-1 where that is more.
    """
    for seed in seeds:
        for name, open_data in PIPELINES.items():
            yield Planned("pipelines", name, "minutes", pipeline(seed), score_pipeline, open_data)


def tables(root: str = "", table: str = "") -> Iterator[Planned]:
    """Every row of every table at 1:8 (see `tables.py`), the rows behind claims first, seed by seed.

    `root`: the folder that holds Tiny-ImageNet; its usual place where empty. `table`: the rows of this one alone.
    """
    if table and table not in TABLES:
        raise ConfigError(f"no table {table!r}; {nearest(table, TABLES)}")
    unique = {row.name: row for row in rows() if table in ("", row.table)}
    retrained = {row.name for row in rows() if row.table == "resolution"}
    kept = partial(arrays_of, sample=spread_images)  # held-out images stand class by class
    for rank, seeds in TABLE_SEEDS.items():
        for seed in seeds:
            for name, row in unique.items():
                if row.rank == rank:
                    score = partial(score_scale, tune=name in retrained)
                    config = rooted(row.config(seed), root)
                    yield Planned("tables", name, "minutes", config, score=score, arrays=kept)


def table_tuning(root: str = "") -> Iterator[Planned]:
    """What the rate of `tables` is chosen from: a grid, on a held-out tenth of the training images."""
    for name, config in tuning_rows():
        yield Planned("tuning", name, "minutes", rooted(config, root), score=score_tuning)


def fashion(root: str = "") -> Iterator[Planned]:
    """Rows on Fashion-MNIST (see `fashion.py`), seed by seed.

    `fashion.CLAIMS` were written before these rows.
    """
    for name, config in fashion_rows():
        config = rooted(config, root)
        yield Planned("fashion", name, "minutes", config, score=score_fashion, arrays=arrays_of)


def fashion_lengths(root: str = "") -> Iterator[Planned]:
    """Four rows of `fashion`, shorter and longer; `fashion.LENGTH_CLAIMS` were written before these rows."""
    for name, config in lengths():
        config = rooted(config, root)
        yield Planned("fashion-length", name, "minutes", config, score=score_fashion)


def fashion_tuning(root: str = "") -> Iterator[Planned]:
    """What the rate of `fashion` is chosen from."""
    for name, config in fashion_tuning_rows():
        yield Planned("fashion-tuning", name, "minutes", rooted(config, root), score=score_tuning)


# --------------------------------------------------------------------------- measuring

EXPERIMENTS: dict[str, Callable[..., Iterator[Planned]]] = {
    "diagnostics": diagnostics,
    "paddings": paddings,
    "readouts": readouts,
    "pipelines": pipelines,
    "tuning": table_tuning,
    "tables": tables,
    "fashion-tuning": fashion_tuning,
    "fashion": fashion,
    "fashion-length": fashion_lengths,
}


def planned_rows(name: str, **options) -> Iterator[Planned]:
    """The rows of an experiment, in the order in which they are measured.

    `options`: `root`, where it has images; `table`, where it has tables. Raises ConfigError for a name that is
    none, and for an option that the experiment has not.
    """
    if name not in EXPERIMENTS:
        raise ConfigError(f"no experiment {name!r}; {nearest(name, EXPERIMENTS)}")
    if extra := options.keys() - signature(EXPERIMENTS[name]).parameters.keys():
        raise ConfigError(f"the experiment {name!r} has no {', '.join(extra)}: leave it out")
    return EXPERIMENTS[name](**options)


def run_missing(
    name: str,
    out: str | Path,
    budget_minutes: float = 0.0,
    report: Callable[[Row, int], None] | None = None,
    **options,
) -> int:
    """Measures the rows of experiment `name` that `out`/NAME.jsonl lacks, as `measuring.measure_missing` does.

    `options` go to the experiment: `root`, where it has images, and `table`, where it has tables.
    -> how many rows are still missing.
    """
    return measure_missing(planned_rows(name, **options), Path(out) / f"{name}.jsonl", budget_minutes, report)
