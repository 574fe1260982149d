"""JPEG files to measure a pipeline with: given ones or drawn ones, as they are and shrunk, repeated into an epoch.

Letters: B images of a batch, S side of an image in pixels, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from io import BytesIO
from pathlib import Path

import numpy
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from cpvt.data.datasets import ImageDataset, Shards, open_dataset
from cpvt.data.pack import pack
from cpvt.errors import DataError

QUALITY = 90  # of drawn JPEGs; with the noise it gives ImageNet's usual bytes a pixel, a little over one half


@dataclass(frozen=True)
class Repeated:
    """A few encoded images over and over, as if there were `length` of them in K classes."""

    source: ImageDataset | Shards
    length: int
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return self.length

    @cached_property
    def labels(self) -> Tensor:
        """(length,) int64."""
        own = torch.as_tensor(self.source.labels) % len(self.classes)
        return own.repeat(-(-self.length // len(own)))[: self.length]

    def read(self, i: int) -> bytes:
        return self.source.read(i % len(self.source))

    def key(self, i: int) -> str:
        return self.source.key(i % len(self.source))

    @cached_property
    def contents(self) -> list[bytes]:
        """Each image once."""
        return [self.source.read(i) for i in range(len(self.source))]

    @property
    def mean_bytes(self) -> float:
        return sum(map(len, self.contents)) / len(self.contents)

    @property
    def bytes_in_order(self) -> Tensor:
        """All bytes, end to end."""
        return torch.from_numpy(numpy.frombuffer(b"".join(self.contents), numpy.uint8).copy())


# --------------------------------------------------------------------------- which files


def prepare(
    data: str,
    folder: Path,
    count: int,
    drawn: tuple[int, int],
    short_side: int,
    length: int,
    classes: int,
    workers: int = 1,
) -> dict[str, tuple[Repeated, Repeated]]:
    """Fills `folder`; -> what our loader reads and what timm's reads: "files" as they are, "shrunk" before.

    Shrunk ones are shards for us and the same bytes as files for timm. At most `count` images are taken, spread
    over `data`: a folder with train/, shards, or loose JPEGs; without it they are drawn, `drawn` high and wide.
    """
    images = _given(Path(data), count) if data else [(i % 2, draw_jpeg(i, *drawn)) for i in range(count)]
    _write(folder / "files", images)
    shards = folder / "shards"
    pack(
        folder / "files",
        shards,
        ("train",),
        short_side=short_side,
        expect="any",
        workers=workers,
        report=lambda _: None,
    )
    shards = Shards(shards / "train")
    _write(folder / "shrunk", [(int(shards.labels[i]), shards.read(i)) for i in range(len(shards))])
    names = tuple(map(str, range(classes)))
    files, shrunk, packed = (
        Repeated(source, max(length, len(source)), names)
        for source in (open_dataset(folder / "files"), open_dataset(folder / "shrunk"), shards)
    )
    return {"files": (files, files), "shrunk": (packed, shrunk)}


def _given(data: Path, count: int) -> list[tuple[int, bytes]]:
    if (data / "train").is_dir():
        source = open_dataset(data, "train")
        chosen = torch.linspace(0, len(source) - 1, min(count, len(source))).long().tolist()
        return [(int(source.labels[i]), source.read(i)) for i in chosen]
    loose = sorted(path for path in data.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))[:count]
    if not loose:
        raise DataError(f"{data} holds no JPEGs: give a folder with train/CLASS/*.JPEG, shards, or JPEGs")
    return [(i % 2, path.read_bytes()) for i, path in enumerate(loose)]


def _write(folder: Path, images: list[tuple[int, bytes]]) -> None:
    for number, (label, content) in enumerate(images):
        path = folder / "train" / f"n{label:08}" / f"{number:06}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def draw_jpeg(number: int, height: int, width: int) -> bytes:
    """Image `number` by formula: three waves of colour under noise."""
    down, across = numpy.mgrid[:height, :width] / max(height, width)
    turns = 2 * numpy.pi * (number % 7 + 1)
    waves = [numpy.sin(turns * (down * a + across * b)) for a, b in ((1, 0), (0, 1), (1, 1))]
    noise = numpy.random.default_rng(number).normal(0, 18, (height, width, 1))
    pixels = 128 + 60 * numpy.stack(waves, axis=2) + noise
    file = BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(numpy.uint8)).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


# --------------------------------------------------------------------------- who decodes


def jpeg_decoder(device: str, found: Callable | None) -> tuple[str, Callable | None]:
    """-> what decodes JPEGs, in words, and what stands in on a GPU without torchcodec, for a measurement only.

    torchvision's hardware path may write into memory that is still read (its pull request 9606).
    """
    place = "GPU" if "cuda" in device else "CPU"
    if found:
        return f"torchcodec, {place}", None
    if place == "CPU":
        return f"Pillow, {place}: torchcodec is missing", None
    stand_in = partial(decode_jpeg, mode=ImageReadMode.RGB, device=device)
    return f"torchvision, {place}: torchcodec is missing", stand_in
