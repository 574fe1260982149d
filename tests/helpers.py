"""What test files share: images, a run with every part of the recipe, the program, a result, waiting."""

import dataclasses
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from cpvt import cli
from cpvt.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig, replace
from cpvt.data.loader import make_loader
from cpvt.training.recipes import DEIT_AUGMENT

EVERYTHING = replace(DEIT_AUGMENT, mix_group=4, repeated_aug=2)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def draw_images(root: Path, train: int = 24, val: int = 7, classes: int = 3, sides=(20, 40)) -> Path:
    """<root>/<split>/<class>/<number>.jpg: coloured noise over gradients, of sides in range(*sides)."""
    rng = numpy.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for label in range(classes):
            folder = root / split / f"n{label:08d}"
            folder.mkdir(parents=True)
            for i in range(count):
                height, width = rng.integers(*sides, 2)
                slope = numpy.linspace(0, 120, width)[None, :, None] * (label == numpy.arange(3))
                pixels = rng.integers(0, 120, (height, width, 3)) + slope
                Image.fromarray(pixels.astype("uint8")).save(folder / f"{i:04d}.jpg", quality=90)
    return root


def small_run(root: Path, out: str = "", store: str = "files", **changes) -> TrainConfig:
    """Twelve steps, two epochs, of a two-block model: everything of the recipe, EMA, two micro-batches.

    `changes` are fields of OptimConfig and RunConfig.
    """
    optim = dict(global_batch_size=8, micro_batch_size=4, steps=12, warmup_steps=2, clip_grad=0.0)
    optim |= dict(label_smoothing=0.1, ema_decay=0.8)
    run = dict(device="cpu", log_every=2, out=out, seed=7)
    for name, value in changes.items():
        (optim if name in OptimConfig.__dataclass_fields__ else run)[name] = value
    body = dict(patch_size=4, width=16, depth=2, heads=2, image_size=(16, 16))
    data = dict(image_size=16, store=store, crop_pct=0.875)
    data |= dict(workers=0) if store == "files" else dict(stored_size=24)
    model, data = ModelConfig(**body, encoding="peg", drop_path=0.3), DataConfig(name=str(root), **data)
    return TrainConfig(model, data, EVERYTHING, optim=OptimConfig(**optim), run=RunConfig(**run))


def tiny_run(encoding="peg", steps=4, **run) -> TrainConfig:
    """A few steps of a two-block model on a drawn task; `run`: fields of RunConfig."""
    model = ModelConfig(patch_size=1, width=16, depth=2, heads=1, encoding=encoding, init_std=0.1)
    data = DataConfig(name="where", grid=(6, 8), train_size=64, test_size=40)
    optim = OptimConfig(global_batch_size=8, steps=steps, lr=1e-3, warmup_steps=2)
    return TrainConfig(model, data, optim=optim, run=RunConfig(**{"device": "cpu", "log_every": 2, **run}))


def run_cli(capsys, *arguments) -> tuple[int, str, str]:
    """`cpvt ...` -> its exit status, what it printed, and its errors."""
    status = 0
    try:
        cli.main([*map(str, arguments)])
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


def through(change, kind="train_batches"):
    """A `make_loader` whose batches of a kind come through `change(batches, its arguments, loader)`."""

    def make(*arguments, **options):
        loader = make_loader(*arguments, **options)
        own = getattr(loader, kind)
        setattr(loader, kind, lambda *start: change(own(*start), start, loader))
        return loader

    return make


def make_result(experiment="x", seed=0, metrics=None, **changes):
    """A valid Result, some fields changed."""
    from cpvt.lab.results import Result  # with pandas, which few need

    columns, data = (
        {"encoding": "peg", "global_pool": "avg"},
        {"dataset": "where", "dataset_sha256": "0" * 64},
    )
    metrics = metrics or {"top1@14": 56.25, "top1@14/d3": 25.0, "images_per_s": 812.5}
    config = dataclasses.asdict(TrainConfig(model=ModelConfig(encoding="peg")))
    about = {"scale": "seconds", "seconds": 31.5, "device": "cpu", "torch": "2.14.1", "cpvt_commit": "abc"}
    about |= {"columns": columns, "config": config, "metrics": metrics, "date": "2026-01-31T12:00:00+00:00"}
    return Result(experiment=experiment, seed=seed, **{**about, **data, **changes})


def wait_until(happened: Callable[[], object], limit: float = 600) -> None:
    """Until `happened()`. The limit in seconds is for what never happens, not for what takes long."""
    end = time.monotonic() + limit
    while not happened():
        assert time.monotonic() < end, f"waited {limit} s in vain"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def descendants(pid: int, generation: int = 1) -> list[int]:
    """The processes that a process has started (1), that these have started (2); none where it is gone."""
    if not generation:
        return [pid]
    found = []
    with suppress(FileNotFoundError, ProcessLookupError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (task / "children").read_text().split())
    return [other for child in found for other in descendants(child, generation - 1)]
