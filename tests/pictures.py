"""A small folder of pictures and a run on it with every part of the recipe; what the tests of training share."""

from pathlib import Path

import numpy
from PIL import Image

from cpvt.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig, replace
from cpvt.training.recipes import DEIT_AUGMENT

EVERYTHING = replace(DEIT_AUGMENT, mix_group=4, repeated_aug=2)


def draw_pictures(root: Path, train: int = 24, val: int = 7, classes: int = 3) -> Path:
    """<root>/<split>/<class>/<number>.jpg of varying sizes: coloured noise over gradients."""
    rng = numpy.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for label in range(classes):
            folder = root / split / f"n{label:08d}"
            folder.mkdir(parents=True)
            for i in range(count):
                height, width = rng.integers(20, 40, 2)
                slope = numpy.linspace(0, 120, width)[None, :, None] * (label == numpy.arange(3))
                pixels = rng.integers(0, 120, (height, width, 3)) + slope
                Image.fromarray(pixels.astype("uint8")).save(folder / f"{i:04d}.jpg", quality=90)
    return root


def small_run(root: Path, out: str = "", store: str = "files", **changes) -> TrainConfig:
    """Twelve steps, two epochs, of a two-block model: everything of the recipe, average, two micro-batches."""
    optim = dict(
        batch=8, micro_batch_size=4, steps=12, rate=1e-3, warmup_steps=2, smoothing=0.1, ema=0.8, clip=0.0
    )
    run = dict(device="cpu", log_every=2, out=out, seed=7)
    for name, value in changes.items():
        (optim if name in OptimConfig.__dataclass_fields__ else run)[name] = value
    return TrainConfig(
        model=ModelConfig(
            patch_size=4, width=16, depth=2, heads=2, encoding="peg", drop_path=0.3, image_size=(16, 16)
        ),
        data=DataConfig(
            name=str(root), image_size=16, store=store, stored_size=24, workers=0, crop_pct=0.875
        ),
        augment=EVERYTHING,
        optim=OptimConfig(**optim),
        run=RunConfig(**run),
    )
