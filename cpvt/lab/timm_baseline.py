"""timm's side of each comparison: its loader with the same recipe, and its model in the mode that suits it best.

Letters: B images of a batch, K classes, S side of an image in pixels.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from io import BytesIO

import numpy
import timm
import torch
from PIL import Image
from timm.data import FastCollateMixup, ImageDataset, Mixup, create_loader
from timm.data.auto_augment import posterize
from torch import Tensor, distributed, nn

from cpvt.config import AugmentConfig, DataConfig, ModelConfig
from cpvt.data.datasets import ImageDataset as ImageFiles
from cpvt.data.loader import Batch, ImageLoader, make_loader, open_split
from cpvt.data.shards import Shards
from cpvt.errors import ConfigError

# --------------------------------------------------------------------------- its loader


def timm_loader(
    source: ImageFiles | Shards,
    batch: int,
    image_size: int,
    classes: int,
    augment: AugmentConfig,
    smoothing: float,
    device: str,
    workers: int,
    mix_in_workers: bool = False,
):
    """timm's training loader over the same files; an epoch of (B, 3, S, S) normalised images and their targets.

    Pillow decodes and augments in `workers` processes; the device normalises and erases (timm's prefetcher).
    `mix_in_workers`: mixup and CutMix are done while a batch is put together, before normalisation and erasing,
    as timm's own training script does. Else the images come unmixed, and `mixer` mixes them as the recipe's
    order wants it. Raises ConfigError for what timm's loader cannot do.
    """
    if augment.randaugment and not augment.crop:
        raise ConfigError("augment.crop=False: timm's training loader always crops; use augment.crop=True")
    mixes = mix_in_workers and (augment.mixup or augment.cutmix)
    repeated_aug = augment.repeated_aug if augment.repeated_aug > 1 else 0
    dataset = ImageDataset("", reader=_Encoded(source))
    with (
        _lone_world() if repeated_aug else nullcontext()
    ):  # timm repeated_aug for several processes only; one will do
        loader = create_loader(
            dataset,
            (3, image_size, image_size),
            batch,
            is_training=True,
            no_aug=not augment.crop,
            re_prob=augment.random_erasing,
            re_mode="pixel",
            scale=augment.crop_scale,
            ratio=augment.crop_ratio,
            hflip=augment.hflip,
            color_jitter=None,
            auto_augment=augment.randaugment or None,
            num_aug_repeats=repeated_aug,
            distributed=bool(repeated_aug),
            interpolation="bicubic",
            num_workers=workers,
            collate_fn=_mixup(FastCollateMixup, augment, smoothing, classes) if mixes else None,
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


def mixer(augment: AugmentConfig, smoothing: float, classes: int) -> Callable[[Tensor, Tensor], tuple]:
    """timm's Mixup on groups of `mix_group` images: (B, 3, S, S), (B,) -> the same mixed, (B, K).

    Where nothing is mixed, both come back as they are.
    """
    if not (augment.mixup or augment.cutmix):
        return lambda images, labels: (images, labels)
    mix = _mixup(Mixup, augment, smoothing, classes)

    def mixed(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        size = augment.mix_group
        pairs = [mix(*pair) for pair in zip(images.split(size), labels.split(size), strict=True)]
        return torch.cat([pair[0] for pair in pairs]), torch.cat([pair[1] for pair in pairs])

    return mixed


def _mixup(kind: type, augment: AugmentConfig, smoothing: float, classes: int):
    switch = {"switch_prob": augment.mixup_switch_prob, "label_smoothing": smoothing, "num_classes": classes}
    return kind(augment.mixup, augment.cutmix, **switch)


class _Encoded:
    """A source of encoded images in the shape of one of timm's readers: (open file, label) by number."""

    def __init__(self, source):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> tuple[BytesIO, int]:
        return BytesIO(self.source.read(i)), int(self.source.labels[i])


@contextmanager
def _lone_world() -> Iterator[None]:
    """One process that is a group of its own, unless there is a group already."""
    lone = not distributed.is_initialized()
    if lone:
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        if lone:
            distributed.destroy_process_group()


# --------------------------------------------------------------------------- its batches in our loop


def selected(dataset: ImageFiles, classes: int) -> ImageFiles:
    """The images of the first `classes` classes alone, in the order of their names (0: of all)."""
    if not classes:
        return dataset
    chosen = dataset.select(i for i, label in enumerate(dataset.labels) if label < classes)
    return dataclasses.replace(chosen, classes=chosen.classes[:classes])


def first_classes(data: DataConfig, *, classes: int = 0, **options) -> ImageLoader:
    """`make_loader` with the images of the first `classes` classes alone (0: of all)."""

    def opened(*which) -> ImageFiles:
        return selected(open_split(*which), classes)

    return make_loader(data, **options, open_split=opened)


def timm_batches(data: DataConfig, **options) -> TimmLoader:
    """The same with training batches through timm's loader; for `train(config, make_loader=timm_batches)`."""
    loader = first_classes(data, **options)
    return TimmLoader(**{field.name: getattr(loader, field.name) for field in dataclasses.fields(loader)})


class TimmLoader(ImageLoader):
    """The same images and the same recipe through timm's loader.

    Its chances come from the three global generators, seeded when the batches are first asked for: the same
    seed gives the same batches for the same number of workers, in a process that draws nothing besides. A run
    that goes on begins with a new epoch of the loader. Held-out images are those of `ImageLoader`.
    """

    def __post_init__(self):
        super().__post_init__()
        if self.data.store != "files" or self.world_size > 1:
            raise ConfigError(
                f"data.store={self.data.store!r}, {self.world_size} processes: timm's loader is compared on "
                "files in one process; use data.store='files' without torchrun"
            )

    def train_batches(self, start_step: int = 0) -> Iterator[Batch]:
        parts, classes, side = self.micro_batches_per_step, self.num_classes, self.image_size[0]
        augment, smoothing = self.transform.config, self.transform.label_smoothing
        for seeded in (random.seed, numpy.random.seed, torch.manual_seed):
            seeded(self.sampler.seed + start_step)
        requests, mix = self.sampler.requests(start_step), mixer(augment, smoothing, classes)
        size, device = self.sampler.global_batch_size // parts, str(self.device)
        loader = timm_loader(self.train_set, size, side, classes, augment, smoothing, device, self.workers)
        while True:
            if augment.repeated_aug > 1:
                loader.sampler.set_epoch(start_step // self.sampler.steps_per_epoch)
            for i, (images, labels) in enumerate(loader, start=1):
                request = next(requests)
                yield Batch(*mix(images, labels), request.epoch, request.positions)
                start_step += i % parts == 0


# --------------------------------------------------------------------------- its model


def timm_model(config: ModelConfig, name: str = "deit_tiny_patch16_224") -> nn.Module:
    """timm's DeiT of the given sizes, with new weights under the names that cpvt.model.zoo understands."""
    return timm.create_model(
        name,
        img_size=config.image_size,
        patch_size=config.patch_size,
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.heads,
        mlp_ratio=config.mlp_ratio,
        num_classes=config.num_classes,
        drop_path_rate=config.drop_path,
    )
