"""timm's side of each comparison: its model, and its loader with the same recipe.

Letters: B images of a batch, K classes, H, W pixels of an image, down and across.
"""

import dataclasses
import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from io import BytesIO
from itertools import chain, repeat

import numpy
import timm
import torch
from PIL import Image
from timm.data import FastCollateMixup, Mixup, create_loader
from timm.data import ImageDataset as TimmDataset
from timm.data.auto_augment import posterize
from torch import distributed, nn
from torch.utils.data import DataLoader

from cpvt.config import AugmentConfig, DataConfig, Grid, ModelConfig, pair
from cpvt.data.datasets import ImageDataset
from cpvt.data.loader import Batch, ImageLoader
from cpvt.data.shards import Shards
from cpvt.errors import ConfigError
from cpvt.lab.metrics import first_classes


def timm_model(config: ModelConfig) -> nn.Module:
    """timm's DeiT of the given sizes, with new weights under the names that cpvt.model.zoo understands."""
    sizes = {"img_size": config.image_size, "patch_size": config.patch_size, "embed_dim": config.width}
    sizes |= {"depth": config.depth, "num_heads": config.heads, "mlp_ratio": config.mlp_ratio}
    sizes |= {"num_classes": config.num_classes, "drop_path_rate": config.drop_path}
    return timm.create_model("deit_tiny_patch16_224", **sizes)


# --------------------------------------------------------------------------- its loader


def timm_loader(
    images: ImageDataset | Shards,
    batch_size: int,
    image_size: int | Grid,
    augment: AugmentConfig,
    device: str,
    workers: int,
    mixup: FastCollateMixup | None = None,
) -> DataLoader:
    """timm's training loader over the same files; an epoch of (B, 3, H, W) normalised images and their targets.

    Pillow decodes and augments in `workers` processes; the device normalises and erases (timm's prefetcher).
    `mixup` is done while a batch is put together, before normalisation and erasing, as in timm's own training
    script. Raises ConfigError for what timm's loader cannot do.
    """
    if augment.randaugment and not augment.crop:
        raise ConfigError("augment.crop=False: timm's training loader always crops; use augment.crop=True")
    dataset, repeats = TimmDataset("", reader=_Reader(images)), augment.repeated_aug > 1
    with _lone_world() if repeats else nullcontext():  # timm repeats images only within a group
        loader = create_loader(
            dataset,
            (3, *pair(image_size)),
            batch_size,
            is_training=True,
            no_aug=not augment.crop,
            re_prob=augment.random_erasing,
            re_mode="pixel",
            scale=augment.crop_scale,
            ratio=augment.crop_ratio,
            hflip=augment.hflip,
            color_jitter=None,
            auto_augment=augment.randaugment or None,
            num_aug_repeats=augment.repeated_aug if repeats else 0,
            distributed=repeats,
            interpolation="bicubic",
            num_workers=workers,
            collate_fn=mixup,
            pin_memory="cuda" in device,
            device=torch.device(device),
        )
    for step in dataset.transform.transforms:
        for operation in getattr(step, "ops", ()):
            if operation.aug_fn is posterize:
                operation.aug_fn = _posterize
    return loader


def _posterize(image: Image.Image, bits: int, **options) -> Image.Image:
    """timm's, black where no bit is kept: magnitude 10 asks for that, and Pillow refuses it from version 13 on."""
    return posterize(image, bits, **options) if bits else image.point(lambda level: 0)


def timm_mixup(augment: AugmentConfig, label_smoothing: float, classes: int, kind=Mixup) -> Mixup | None:
    """timm's Mixup (on a batch), or FastCollateMixup (while one is put together); None where nothing is mixed."""
    if not (augment.mixup or augment.cutmix):
        return None
    options = {"switch_prob": augment.mixup_switch_prob, "label_smoothing": label_smoothing}
    return kind(augment.mixup, augment.cutmix, **options, num_classes=classes)


class _Reader:
    """Encoded images in the shape of one of timm's readers: (open file, label) by number."""

    def __init__(self, images: ImageDataset | Shards):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[BytesIO, int]:
        return BytesIO(self.images.read(i)), int(self.images.labels[i])


@contextmanager
def _lone_world() -> Iterator[None]:
    """One process as a group of its own."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


# --------------------------------------------------------------------------- its batches in our loop


def timm_batches(data: DataConfig, **options) -> "TimmLoader":
    """`first_classes` with training batches through timm's loader: a `make_loader` of `train`."""
    processes, repeated = options.get("world_size", 1), options["augment"].repeated_aug
    if data.store != "files" or processes > 1 or repeated > 1:
        given = f"data.store={data.store!r}, {processes} processes, augment.repeated_aug={repeated}"
        raise ConfigError(f"{given}: timm's loader reads data.store='files' in one process, each image once")
    loader = first_classes(data, **options)
    return TimmLoader(**{field.name: getattr(loader, field.name) for field in dataclasses.fields(loader)})


class TimmLoader(ImageLoader):
    """The same images and the same recipe through timm's loader, in one process; held-out images are ours.

    A batch is one group of mixed images. Chances come from the three global generators, seeded when the batches
    are first asked for: the same seed and number of workers give the same batches. A run that goes on begins with
    a new epoch of the loader.
    """

    def train_batches(self, start_step: int = 0) -> Iterator[Batch]:
        parts, augment = self.micro_batches_per_step, self.transform.config
        for seeded in (random.seed, numpy.random.seed, torch.manual_seed):
            seeded(self.sampler.seed + start_step)
        requests, size = self.sampler.requests(start_step), self.sampler.global_batch_size // parts
        mixup = timm_mixup(augment, self.transform.label_smoothing, self.num_classes)
        shape, device = self.image_size, str(self.device)
        loader = timm_loader(self.train_set, size, shape, augment, device, self.workers)
        for batch, request in zip(chain.from_iterable(repeat(loader)), requests, strict=False):
            yield Batch(request, *(mixup(*batch) if mixup else batch))
