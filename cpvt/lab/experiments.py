"""Every table as a list of rows: what was measured, what is to be, and how each row is configured.

A row is its columns, {"encoding": "peg", "global_pool": "avg"}; those that it does not name have the usual values
of `results.COLUMNS`. Of each experiment there stand here a function from columns to a configuration, and its rows
as jobs, in the order in which `runner.run_missing` measures them: where rows are compared within a table, first
seeds first, so that whoever stops early has a whole table; beyond the core of `photographs` row by row.
"""

from collections.abc import Callable, Iterator
from functools import partial
from inspect import signature
from itertools import product

from cpvt.config import (
    AugmentConfig,
    DataConfig,
    DistillConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
    replace,
)
from cpvt.data.loader import make_loader
from cpvt.errors import ConfigError, check_name
from cpvt.lab import metrics
from cpvt.lab.photographs import SIDE, open_photographs
from cpvt.lab.results import complete
from cpvt.lab.runner import TEACHER, Job
from cpvt.training.recipes import DEIT_AUGMENT

FIVE = "peg(positions=(0, 1, 2, 3, 4))"
KERNEL_27 = "peg(positions=(-1,), kernel=27, compute='matrix')"
DENSE = "peg(positions=(0, 1, 2, 3, 4, 5), kernel=1, convolution='dense')"
POOLED, TAUGHT = {"global_pool": "avg"}, {"distilled": True, "teacher": TEACHER}
SEEDS = (0, 1, 2)
# DeiT's 0.02 suits widths from 192 on; with it a width of 32 hardly moves at first.
_NARROW = {"mlp_ratio": 2.0, "init_std": 0.1}


def _rows(*encodings: str, **columns) -> list[dict]:
    return [{"encoding": encoding, **columns} for encoding in encodings]


# --------------------------------------------------------------------------- synthetic tasks: seconds on a CPU

# The grids are as small as the questions allow: distances 0-4 to the border, separations 2-9 with two rows and
# columns of margin, and two positions on either side for the bars of *what*.
GRIDS = {"where": (10, 10), "arrangement": (6, 14), "what": (8, 12)}
CHANCE = {"where": 25.0, "arrangement": 50.0, "what": 50.0}
POOLS = ("token", "avg")
ENCODINGS = (
    *("none", "learned", "sine", "relative", "relative(wrap=True)", "rotary"),
    *("peg", "peg(positions=(0, 1))", "peg(positions=(-1, 0, 1))", FIVE),
    *("peg(kernel=5)", "peg(kernel=7)", KERNEL_27, "learned + peg"),
)
# What stands beyond the border, the same without the skip (which no padding has to drop), and the border alone.
PADDINGS = (
    *("peg(padding='none', skip=False)", "peg(skip=False)", "peg(padding='replicate')"),
    *("peg(padding='reflect')", "peg(padding='circular')", "peg(on='constant')"),
)


def synthetic_config(
    task: str, encoding: str, global_pool: str = "token", max_steps: int = 500, seed: int = 0
) -> TrainConfig:
    """One pixel a token, three blocks of width 32; five PEGs after blocks 0-4 need six, all else is the same."""
    check_name("synthetic task", task, GRIDS)
    body = {"image_size": GRIDS[task], "patch_size": 1, "num_classes": 4 if task == "where" else 2}
    body |= {"width": 32, "depth": 6 if "3, 4" in encoding else 3, "heads": 1, **_NARROW}
    length = {"steps": max_steps, "warmup_steps": 30, "stop_loss": 0.01}
    return TrainConfig(
        model=ModelConfig(encoding=encoding, global_pool=global_pool, **body),
        data=DataConfig(name=task, grid=GRIDS[task], train_size=1 << 16, test_size=512),
        optim=OptimConfig(global_batch_size=32, lr=3e-3, min_lr=1e-5, **length),
        run=RunConfig(seed=seed, device="cpu", log_every=100),
    )


def _synthetic_job(experiment: str, seed: int, **columns) -> Job:
    row = complete(experiment, columns)
    return Job(experiment, row, "seconds", synthetic_config(**row, seed=seed), metrics.score_synthetic)


def synthetic() -> Iterator[Job]:
    """Every encoding on the synthetic tasks, with class token and average pooling; up to two minutes a row."""
    for seed, pool, encoding, task in product(SEEDS, POOLS, ENCODINGS, GRIDS):
        yield _synthetic_job("synthetic", seed, task=task, encoding=encoding, global_pool=pool)


def pictures() -> Iterator[Job]:
    """*Where* with the encodings whose trained weights are kept for pictures; a minute a row."""
    for encoding in KEPT:
        columns = complete("pictures", {"task": "where", "encoding": encoding})
        config = synthetic_config(**columns)
        yield Job("pictures", columns, "seconds", config, metrics.score_synthetic, keep_weights=True)


def padding() -> Iterator[Job]:
    """*Where* with every padding of one PEG and a class token; `synthetic` has zero padding with its skip.

    Written before these rows, after a pilot of no padding (42 at 300 steps) and of circular (25): no accuracy at
    any distance is above the ceiling of a reach of 1 for no padding, zeros and reflect, of 0 for replicate and
    for the border alone, of nothing for circular; and without padding the position is learnt at both visible
    distances.
    """
    for seed, encoding in product(SEEDS, PADDINGS):
        yield _synthetic_job("padding", seed, task="where", encoding=encoding)


def pooling() -> Iterator[Job]:
    """Class token against pooling where the rows of `synthetic` hint at a difference, on fresh seeds.

    Written before these rows, after a look at those of `synthetic` (three seeds, 42 differences): with five PEGs
    pooling is behind on *where*; with sine it is ahead on the unseen side of *what*; and five PEGs with pooling
    solve *where* (95 % and more in every seed) given 2000 steps, since their reach allows it.

    Afterwards, since claim and fresh seeds did not agree: the three runs that had hinted at it, repeated with the
    same seeds and configuration.
    """
    hints = ("what", "sine"), ("where", FIVE)
    for seed, (task, encoding), pool in product(range(3, 8), hints, POOLS):
        yield _synthetic_job("pooling", seed, task=task, encoding=encoding, global_pool=pool)
    for seed, steps in (*product(range(3, 6), [2000]), *product(SEEDS, [500])):
        yield _synthetic_job("pooling", seed, task="where", encoding=FIVE, max_steps=steps, **POOLED)


# --------------------------------------------------------------------------- pipelines: minutes on a CPU

CLASSES = 20  # the first of Tiny-ImageNet's 200: 10,000 images to train on, 1,000 held out


def pipeline_config(seed: int = 0) -> TrainConfig:
    """DeiT's recipe on small images: 64 pixels, crops of 28, 7 x 7 tokens, four blocks of width 64 with a PEG.

    One group of mixed images is one batch, as it is for timm. No image is repeated, or six epochs would show each
    only twice.
    """
    body = dict(image_size=(28, 28), patch_size=4, num_classes=CLASSES, width=64, depth=4, heads=2)
    length = {"epochs": 6, "warmup_epochs": 1}
    return TrainConfig(
        model=ModelConfig(encoding="peg", drop_path=0.1, **body, **_NARROW),
        data=DataConfig(name="tiny-imagenet", image_size=28, store="files", workers=0, crop_pct=0.875),
        augment=replace(DEIT_AUGMENT, mix_group=64, repeated_aug=1),
        optim=OptimConfig(global_batch_size=64, lr=2e-3, label_smoothing=0.1, clip_grad=0.0, **length),
        run=RunConfig(seed=seed, device="cpu", log_every=100),
    )


def pipelines() -> Iterator[Job]:
    """Tiny-ImageNet's first twenty classes through this package's pipeline and through timm's loader.

    All else is the same: model and first weights, loss, optimiser, steps, and evaluation. What differs is who
    draws the recipe's chances and who computes the pixels.

    Written before the first run: no difference is expected. The means of three seeds will differ by less than
    twice the standard error of their difference, or by less than 1.5 points of top-1 where that is more.
    """
    from cpvt.lab.timm_baseline import timm_batches  # timm takes a second to import

    loaders = {"cpvt": metrics.first_classes, "timm": timm_batches}
    for seed, (name, make) in product(SEEDS, loaders.items()):
        score, loader = (partial(each, classes=CLASSES) for each in (metrics.score_pipeline, make))
        yield Job("pipelines", {"pipeline": name}, "minutes", pipeline_config(seed), score, loader)


# --------------------------------------------------------------------------- photographs: two cores, or a GPU
# The paper's tables on Tiny-ImageNet's first hundred classes. At 32 pixels in tokens of 4 x 4 (`grid` 8) a row
# takes about twenty minutes of one core; at 28 pixels in tokens of 2 x 2 (`grid` 14: the paper's grid of 224) it
# wants a GPU. All else is the same.

BAG = {"encoding": "none", "mlp_only_blocks": 6, **POOLED}  # patches that never meet: a baseline
_STEM, _BARE, _SHIFTED, _TWO_HEADS = (
    {"stem": "conv"},
    {"mlp_only_blocks": 1},
    {"shifted": True},
    {"distilled": True},
)
CIRCULAR, BORDER = "peg(padding='circular')", "peg(on='constant')"
CORE = ("none", "learned", "peg", FIVE, CIRCULAR, "rotary", BORDER)
FOUR = ("none", "learned", "peg", FIVE)

# table -> its rows, in the order in which they are measured; a row that is in several is trained once.
TABLES: dict[str, list[dict]] = {
    "core": _rows(*CORE) + [BAG],
    "encodings": _rows("sine", "learned + peg", "peg(repeat=4)", "relative", "relative + peg")
    + _rows(*FOUR, **_STEM)
    + _rows("relative(on='keys_values')", "relative(wrap=True)"),
    "placement": _rows("peg(positions=(-1,))", "peg(positions=(3,))")
    + _rows("none", "peg(positions=(-1,))", "peg", **_BARE)
    + _rows("peg(positions=(5,))", KERNEL_27, "peg(positions=(-1,), repeat=13)"),
    "parameters": _rows("peg(on='queries_keys')", "peg(frozen=True)", DENSE, "peg(convolution='separable')"),
    "padding": _rows("peg(padding='none', skip=False)", "peg(padding='replicate')", "peg(padding='reflect')")
    + _rows("peg(skip=False)"),
    "pooling": _rows(*FOUR, **POOLED)
    + _rows("learned", "peg", **_TWO_HEADS)
    + _rows("learned", "peg", **TAUGHT),
    "shifted": _rows("none", "learned", "peg", CIRCULAR, **_SHIFTED),
    "pictures": _rows("peg(positions=(0, 1, 2))"),  # for its weights; see `KEPT`
}
TABLE_SEEDS = {"core": (0, 1, 2, 3, 4), "pictures": (0,)}  # the others: SEEDS
KEPT = (
    "none",
    "learned",
    "sine",
    "peg",
    "peg(positions=(0, 1, 2))",
    CIRCULAR,
)  # whose weights are kept, of seed 0
LR, EPOCHS = 4e-3, 10  # the best on average over the encodings of `pilot`
PILOT_RATES, PILOT_EPOCHS = (1e-3, 2e-3, 4e-3, 8e-3), 2
_CROPS = {"crop": True, "crop_scale": ((48 / 64) ** 2, 1.0), "crop_ratio": (1.0, 1.0), "hflip": 0.5}


def photograph_config(
    seed: int = 0, lr: float = LR, epochs: int = EPOCHS, root: str = "", **columns
) -> TrainConfig:
    """A row's columns -> six blocks of width 96; squares of 48 to 64 of 64 pixels, mirrored at random.

    The squares lie in the middle, so that no row has seen an object moved; `shifted` rows have them anywhere.
    """
    row = complete("photographs", columns)
    own = {name: row[name] for name in ("encoding", "stem", "global_pool", "distilled", "mlp_only_blocks")}
    size, patch = {8: (32, 4), 14: (28, 2)}[row["grid"]]
    body = dict(image_size=(size, size), patch_size=patch, num_classes=100, width=96, depth=6, heads=3)
    place = "random" if row["shifted"] else "centre"
    sizes = {"image_size": size, "stored_size": SIDE, "interpolation": "area"}
    return TrainConfig(
        model=ModelConfig(**body, mlp_ratio=2.0, init_std=0.05, **own),
        data=DataConfig(name="tiny-imagenet", root=root or DataConfig.root, **sizes),
        augment=AugmentConfig(**_CROPS, crop_place=place),
        optim=OptimConfig(
            global_batch_size=256, lr=lr, epochs=epochs, warmup_epochs=1, min_lr=1e-5, label_smoothing=0.1
        ),
        distill=DistillConfig(teacher=row["teacher"]),
        run=RunConfig(seed=seed, precision="bf16", log_every=100),
    )


def photographs(root: str = "", only: str = "", grid: int = 8) -> Iterator[Job]:
    """Every table of the paper on photographs, or `only` one: core rows with five seeds first.

    `root`: the folder that holds Tiny-ImageNet. About twenty minutes of one core a row.
    """
    if only:
        check_name("table", only, TABLES)
    if grid not in (8, 14):
        raise ConfigError(f"grid={grid}: photographs are trained on grids of 8 or of 14 tokens")
    done = []
    for table in [only] if only else TABLES:
        rows, seeds = TABLES[table], TABLE_SEEDS.get(table, SEEDS)
        # Beyond the core all seeds of a row, for with one it says little, and a table is long.
        ordered = product(seeds, rows) if table == "core" else ((seed, row) for row in rows for seed in seeds)
        for seed, row in ordered:
            row = complete("photographs", row | {"grid": grid})
            if (seed, row) not in done:
                done.append((seed, row))
                kept = seed == 0 and row == complete("photographs", {"encoding": row["encoding"], "grid": 8})
                yield Job(
                    "photographs",
                    row,
                    "minutes",
                    photograph_config(seed, root=root, **row),
                    metrics.score_photographs,
                    photograph_loader,
                    metrics.arrays_of,
                    keep_weights=kept and row["encoding"] in KEPT,
                )


def pilot(root: str = "") -> Iterator[Job]:
    """What length and learning rate of `photographs` are chosen from, on a held-out tenth of the training images.

    The core rows at each rate for two epochs; the table and the bag of patches for the whole length.
    """
    tried = [(lr, PILOT_EPOCHS, row) for row, lr in product(_rows(*CORE), PILOT_RATES)]
    for lr, epochs, row in [(LR, EPOCHS, row) for row in _rows("learned") + [BAG]] + tried:
        columns = complete("pilot", {**row, "lr": lr, "epochs": epochs})
        config = photograph_config(lr=lr, epochs=epochs, root=root, **row)
        config = replace(config, data=replace(config.data, hold_out=10))
        yield Job("pilot", columns, "minutes", config, metrics.score_pilot, photograph_loader)


def precision(root: str = "") -> Iterator[Job]:
    """One row of `photographs` in float32 throughout, where all others compute in bfloat16.

    Written before it was measured: its top-1 differs from that of the same seed by less than the
    highest and the lowest of the row's five seeds do.
    """
    columns = complete("precision", {"encoding": "peg", "precision": "fp32"})
    config = photograph_config(4, root=root, encoding="peg")
    config = replace(config, run=replace(config.run, precision=columns["precision"]))
    yield Job("precision", columns, "minutes", config, metrics.score_photographs, photograph_loader)


photograph_loader = partial(make_loader, open_split=open_photographs)


# --------------------------------------------------------------------------- all of them

_ALL = (synthetic, pictures, padding, pooling, pipelines, pilot, photographs, precision)
EXPERIMENTS: dict[str, Callable[..., Iterator[Job]]] = {f.__name__.replace("_", "-"): f for f in _ALL}


def jobs(experiment: str, **options) -> list[Job]:
    """The rows of an experiment, in the order in which they are measured.

    `options`: those of its function above, such as `root`, where it has images. Raises ConfigError for a name that
    is none, and for an option that the experiment has not.
    """
    check_name("experiment", experiment, EXPERIMENTS)
    if extra := options.keys() - signature(EXPERIMENTS[experiment]).parameters.keys():
        raise ConfigError(f"the experiment {experiment!r} has no {', '.join(extra)}: leave it out")
    return list(EXPERIMENTS[experiment](**options))
