"""One configuration trained on real images through this package's data pipeline, and through timm's."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from cpvt.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from cpvt.data.datasets import open_dataset
from cpvt.lab.timm_baseline import Selected, TimmBatches, selected
from cpvt.training.recipes import DEIT_AUGMENT
from cpvt.training.train import Run

CLASSES = 20  # the first of Tiny-ImageNet's 200: 10,000 images to train on, 1,000 held out
PIPELINES: dict[str, Callable] = {
    "this package": partial(Selected, classes=CLASSES),
    "timm": partial(TimmBatches, classes=CLASSES),
}


def pipeline(seed: int = 0, epochs: int = 6) -> TrainConfig:
    """The configuration that is trained through either pipeline: DeiT's recipe on small images.

    64-pixel images, crops resized to 28, 7 x 7 tokens, four blocks of width 64 with a PEG. One group of mixed
    images is one batch, as it is for timm. No image is repeated, or six epochs would show each only
    twice.
    """
    return TrainConfig(
        model=ModelConfig(
            image_size=(28, 28),
            patch_size=4,
            num_classes=CLASSES,
            width=64,
            depth=4,
            heads=2,
            mlp_ratio=2.0,
            encoding="peg",
            drop_path=0.1,
            init_std=0.1,  # see `experiments.diagnostic`
        ),
        data=DataConfig(name="tiny-imagenet", image_size=28, store="files", workers=0, crop_pct=0.875),
        augment=replace(DEIT_AUGMENT, mix_group=64, repeated_aug=1),
        optim=OptimConfig(
            global_batch_size=64, epochs=epochs, lr=2e-3, warmup_epochs=1, label_smoothing=0.1, clip_grad=0.0
        ),
        run=RunConfig(seed=seed, device="cpu", log_every=100),
    )


def score_pipeline(run: Run) -> tuple[dict[str, float], str, str]:
    """-> top-1 and top-5 on the held-out images of the chosen classes, and the SHA-256 of their files.

    The digest is one over the sorted digests of (label, bytes), since copies of the data set order their files
    differently.
    """
    data, tokens = run.config.data, run.config.model.grid[0]
    held_out = selected(open_dataset(data.name, "val", data.root), CLASSES)
    files = (b"%d\n" % label + held_out.read(i) for i, label in enumerate(held_out.labels))
    digest = hashlib.sha256("".join(sorted(hashlib.sha256(file).hexdigest() for file in files)).encode())
    metrics = {f"{name}@{tokens}": run.metrics[name] for name in ("top1", "top5")}
    metrics |= {"images": run.metrics["images"], "unusable_images": run.faults}
    return metrics, f"{data.name}, its first {CLASSES} classes", digest.hexdigest()
