"""Batches as a function of the step: the same seed and step give the same batch, whatever came before."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from cpvt.config import DataConfig
from cpvt.data.datasets import DataError, ImageTensors, load_tensors, open_dataset
from cpvt.data.diagnostics import CLASSES, draw

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, the field's convention


class Diagnostics:
    """Batches of a synthetic diagnostic, drawn as they are needed. (B, 3, H*pixels, W*pixels), (B,)."""

    def __init__(self, data: DataConfig, batch: int, seed: int, device: str = "cpu"):
        self.data, self.size, self.seed, self.device = data, batch, seed, device
        self.num_classes = len(CLASSES[data.name])
        self.image_size = data.grid[0] * data.pixels, data.grid[1] * data.pixels
        self.fingerprint = "drawn"  # by formula: the configuration says all

    def draw(self, index: Tensor, split: str, **options):
        options = {"grid": self.data.grid, "pixels": self.data.pixels, "seed": self.seed, **options}
        return draw(self.data.name, index.to(self.device), split=split, **options)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        start = step * self.size % self.data.train_size
        sample = self.draw((torch.arange(self.size) + start) % self.data.train_size, "train")
        return normalise(sample.images), sample.labels

    def test(self, split: str = "val") -> Iterator[tuple[Tensor, Tensor]]:
        for index in torch.arange(self.data.test_size).split(256):
            sample = self.draw(index, split)
            yield normalise(sample.images), sample.labels


class Images:
    """Batches of real images held in memory as bytes, in an order drawn anew each epoch; last rest dropped."""

    def __init__(self, data: DataConfig, batch: int, seed: int, device: str = "cpu"):
        self.data, self.size, self.seed, self.device = data, batch, seed, device
        self.train, self.held_out = (self._load(split) for split in ("train", "val"))
        if len(self.train.labels) < batch:
            raise DataError(
                f"{data.name}: {len(self.train.labels)} training images, batch {batch}; choose a smaller batch"
            )
        self.num_classes = len(self.train.classes)
        self.image_size = data.image_size, data.image_size
        self.fingerprint = self.train.fingerprint

    def _load(self, split: str) -> ImageTensors:
        dataset, limit = open_dataset(self.data.name, split, root=self.data.root), self.data.limit
        if 0 < limit < len(dataset):  # spread over the classes, which stand one after the other
            dataset = dataset.select(torch.linspace(0, len(dataset) - 1, limit).long())
        return load_tensors(dataset, self.data.image_size)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        per_epoch = len(self.train.labels) // self.size
        epoch, step = divmod(step, per_epoch)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.train.labels), generator=generator)
        index = order[step * self.size : (step + 1) * self.size]
        images, labels = self.train.images[index], self.train.labels[index]
        return normalise(images.to(self.device).float() / 255), labels.to(self.device)

    def test(self, split: str = "val") -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = self.held_out.images, self.held_out.labels
        for i in range(math.ceil(len(labels) / 256)):
            part = slice(256 * i, 256 * (i + 1))
            yield normalise(images[part].to(self.device).float() / 255), labels[part].to(self.device)


def normalise(images: Tensor) -> Tensor:
    """(B, 3, height, width) in [0, 1] -> the same with ImageNet's mean taken off and deviation divided out."""
    mean, std = (images.new_tensor(v)[:, None, None] for v in (MEAN, STD))
    return (images - mean) / std


def open_batches(data: DataConfig, batch: int, seed: int, device: str = "cpu") -> Diagnostics | Images:
    """The batches that `data` names: a diagnostic, a known set of images, or a folder."""
    return (Diagnostics if data.name in CLASSES else Images)(data, batch, seed, device)
