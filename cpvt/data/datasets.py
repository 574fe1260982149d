"""Images and labels by name or path; the diagnostics, which are drawn and not read, are handed on from here.

Letters: n images, S side of an image in pixels.
"""

import gzip
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import datasets as published
from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension
from torchvision.datasets.mnist import read_image_file, read_label_file
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.transforms.v2 import functional as transforms

from cpvt.data.shards import Shards, check_resolution, decode, opened, stored_side_needed
from cpvt.data.synthetic import Diagnostic, draw
from cpvt.errors import DataError

__all__ = [
    "Diagnostic",
    "ImageDataset",
    "ImageTensors",
    "Shards",
    "check_resolution",
    "draw",
    "load_tensors",
    "open_dataset",
    "stored_side_needed",
]

TINY_IMAGENET = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
TINY_IMAGENET_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
FASHION_MNIST_CLASSES = tuple(published.FashionMNIST.classes)
FASHION_MNIST_DEBIAN = Path(
    "/usr/share/datasets/fashion-mnist"
)  # where the package dataset-fashion-mnist puts it


class Paths(Sequence):
    """Paths as one block of bytes. A million Python objects would be copied, page by page, into every process that
    reads: looking at an object counts as writing to it."""

    def __init__(self, paths: Iterable[Path]):
        names = [os.fsencode(path) for path in paths]
        self.block, self.ends = b"".join(names), numpy.cumsum([0, *map(len, names)])

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, i: int) -> Path:
        i = range(len(self))[i]
        return Path(os.fsdecode(self.block[self.ends[i] : self.ends[i + 1]]))


@dataclass(frozen=True)
class ImageDataset(Dataset):
    """Pairs (PIL image in RGB, label), each image decoded when it is asked for.

    items     a path or a uint8 array, (H, W) or (H, W, 3), for each image
    labels    an index into `classes` for each image
    classes   WordNet ids in sorted order, or the names that the publisher gives
    """

    name: str
    split: str
    classes: tuple[str, ...] = field(repr=False)
    items: Sequence = field(repr=False)
    labels: list[int] = field(repr=False)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        item = self.items[i]
        if not isinstance(item, Path):
            return Image.fromarray(item).convert("RGB"), self.labels[i]
        return decode(item, str(item)), self.labels[i]

    def read(self, i: int) -> bytes:
        """The bytes of image i as its file holds them."""
        item = self._file(i)
        try:
            return item.read_bytes()
        except OSError as error:
            raise DataError(f"{item} cannot be read ({error.strerror}): replace or delete it") from error

    def key(self, i: int) -> str:
        """The path of image i."""
        return str(self._file(i))

    @cached_property
    def sizes(self) -> Tensor:
        """(n, 2) int64: height and width in pixels, EXIF ignored, from the header of every file."""
        sizes = torch.empty(len(self), 2, dtype=torch.int64)
        for i in range(len(self)):
            with opened(self._file(i), self.key(i)) as image:
                sizes[i] = torch.tensor((image.height, image.width))
        return sizes

    def _file(self, i: int) -> Path:
        if not isinstance(self.items[i], Path):
            raise DataError(f"image {i} of {self.name} is held as an array, not a file: take dataset[{i}]")
        return self.items[i]

    def select(self, index) -> "ImageDataset":
        """The images at these indices, in this order, with all classes."""
        index = [int(i) for i in index]
        items, labels = [self.items[i] for i in index], [self.labels[i] for i in index]
        return replace(self, items=items, labels=labels)


@dataclass(frozen=True)
class ImageTensors:
    """A data set in memory: images (n, 3, S, S) uint8, labels (n,) int64."""

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over shape, classes, labels and pixels, in hexadecimal: equal for equal data alone."""
        head = repr((tuple(self.images.shape), tuple(self.classes)))
        digest = hashlib.sha256(head.encode())
        digest.update(self.labels.cpu().contiguous().numpy())
        digest.update(self.images.cpu().contiguous().numpy())
        return digest.hexdigest()


def load_tensors(dataset: ImageDataset | Shards, size: int) -> ImageTensors:
    """Decode a data set into memory: short side to `size` pixels (antialiased bicubic), centre square.

    For small data: n images take 3 n size^2 bytes.
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise DataError(f"size={size!r} was given: give the side of the images, a whole number of pixels")
    images = torch.empty(len(dataset), 3, size, size, dtype=torch.uint8)
    labels = torch.empty(len(dataset), dtype=torch.int64)
    for i in range(len(dataset)):
        image, labels[i] = dataset[i]
        if image.size != (size, size):
            image = transforms.resize(image, size, transforms.InterpolationMode.BICUBIC, antialias=True)
            image = transforms.center_crop(image, [size, size])
        images[i] = transforms.pil_to_tensor(image)
    return ImageTensors(images, labels, tuple(dataset.classes))


def open_dataset(
    name_or_path: str | Path, split: str = "train", root: str | Path = "data/images", download: bool = True
) -> ImageDataset | Shards:
    """Open one split of a data set.

    name_or_path  "tiny-imagenet", "cifar10" or "fashion-mnist", or a folder: what `cpvt pack` wrote,
                  <split>/<class>/*.JPEG as ImageNet, Tiny-ImageNet as published, CIFAR-10's or
                  Fashion-MNIST's own files
    split         "train", "val" (CIFAR-10's and Fashion-MNIST's test images), or another that the folder has
    root          the folder that holds, or will hold, the data sets known by name
    download      fetch a data set known by name where `root` does not hold it

    Raises DataError where something is missing, with the folder to fill.
    """
    name, root = str(name_or_path), Path(root)
    if name in NAMED:
        return NAMED[name](split, root, download)
    path = Path(name_or_path)
    if not path.is_dir():
        known = ", ".join(NAMED)
        raise DataError(f"no folder and no data set {name!r}: give an existing folder, or one of {known}")
    if path.resolve().name == published.CIFAR10.base_folder:
        return _read_cifar10(path.resolve().parent, split)
    if any(path.glob("*-ubyte*")):
        return _read_fashion_mnist(path, split)
    if (path / split / "index.json").is_file():
        return Shards(path / split)
    return _read_folder(path, split)


# Folders of images


def _read_folder(path: Path, split: str, name: str | None = None) -> ImageDataset:
    """<path>/<split>/<class>/**/*.JPEG, or Tiny-ImageNet's val/images with its val_annotations.txt."""
    here = path / split
    if not here.is_dir():
        found = ", ".join(_folders(path)) or "none"
        raise DataError(f"{path} has no folder {split!r} (folders: {found}): expected {here}/<class>/*.JPEG")
    name = name or path.name
    # The classes are those of train/, whatever the split, or labels would mean different things.
    classes = tuple(_folders(path / "train" if (path / "train").is_dir() else here))
    if (here / "val_annotations.txt").is_file():
        items, labels = _read_annotations(here, classes)
        return ImageDataset(name, split, classes, items, labels)
    if not classes:
        raise DataError(f"{here} has no class folders: expected {here}/<class>/*.JPEG")
    stray = [folder for folder in _folders(here) if folder not in classes]
    if stray:
        raise DataError(
            f"{here} has {len(stray)} classes that {path / 'train'} lacks (the first: {stray[0]}): "
            f"unpack the same classes into both, or delete them"
        )
    items, labels = [], []
    for label, wnid in enumerate(classes):
        images = sorted(
            p for p in (here / wnid).rglob("*") if has_file_allowed_extension(p.name, IMG_EXTENSIONS)
        )
        if not images:
            endings = " ".join(IMG_EXTENSIONS)
            raise DataError(
                f"{here / wnid} holds no images ({endings}): fill it, or delete it in every split"
            )
        items += images
        labels += [label] * len(images)
    return ImageDataset(name, split, classes, Paths(items), labels)


def _read_annotations(here: Path, classes: tuple[str, ...]) -> tuple[list[Path], list[int]]:
    """Tiny-ImageNet's list: file name, WordNet id and a box, parted by tabs, one image a line."""
    annotations = here / "val_annotations.txt"
    number = {wnid: label for label, wnid in enumerate(classes)}
    items, labels = [], []
    for line, text in enumerate(annotations.read_text().splitlines(), start=1):
        name, wnid, *_ = [*text.split("\t"), "", ""]
        if wnid not in number:
            raise DataError(
                f"{annotations}, line {line}: {wnid!r} is not in {here.parent / 'train'}, unpack it again"
            )
        items.append(here / "images" / name)
        labels.append(number[wnid])
        if not items[-1].is_file():
            raise DataError(f"{annotations}, line {line}: no file {items[-1]}, unpack the archive again")
    return items, labels


def _folders(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


# Data sets known by name


def _open_tiny_imagenet(split: str, root: Path, download: bool) -> ImageDataset:
    folder = _first_folder(root / "tiny-imagenet-200", root / "tiny-imagenet")
    if folder is None:
        _fetch(
            "tiny-imagenet",
            root,
            "tiny-imagenet-200",
            download,
            f"{root / 'tiny-imagenet-200'} with train/ and val/, from {TINY_IMAGENET}",
            lambda to: download_and_extract_archive(
                TINY_IMAGENET, to, md5=TINY_IMAGENET_MD5, remove_finished=True
            ),
        )
        folder = root / "tiny-imagenet-200"
    if split not in ("train", "val"):
        raise DataError(
            f"split={split!r} was given for tiny-imagenet: use 'train' or 'val', which have labels"
        )
    return _read_folder(folder, split, "tiny-imagenet")


def _open_cifar10(split: str, root: Path, download: bool) -> ImageDataset:
    if _first_folder(root / "cifar-10-batches-py") is None:
        _fetch(
            "cifar10",
            root,
            "cifar-10-batches-py",
            download,
            f"{root / 'cifar-10-batches-py'} with data_batch_1 ... data_batch_5, test_batch, batches.meta, "
            f"from {published.CIFAR10.url}",
            lambda to: published.CIFAR10(to, download=True),
        )
    return _read_cifar10(root, split)


def _read_cifar10(root: Path, split: str) -> ImageDataset:
    train = _is_train("cifar10", split)
    try:
        data = published.CIFAR10(root, train=train)
    except (RuntimeError, OSError) as error:
        folder = root / published.CIFAR10.base_folder
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{folder} cannot be read ({reason}): unpack {published.CIFAR10.url} again"
        ) from error
    return ImageDataset("cifar10", split, tuple(data.classes), list(data.data), list(data.targets))


def _open_fashion_mnist(split: str, root: Path, download: bool) -> ImageDataset:
    raw = root / "FashionMNIST" / "raw"
    folder = _first_folder(raw, root / "fashion-mnist", FASHION_MNIST_DEBIAN)
    if folder is None:
        _fetch(
            "fashion-mnist",
            root,
            "FashionMNIST",
            download,
            f"{raw} with train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and "
            f"t10k-labels-idx1-ubyte (.gz or not), from {published.FashionMNIST.mirrors[0]}, or install "
            f"Debian's package dataset-fashion-mnist",
            lambda to: published.FashionMNIST(to, download=True),
        )
        folder = raw
    return _read_fashion_mnist(folder, split)


def _read_fashion_mnist(folder: Path, split: str) -> ImageDataset:
    prefix = "train" if _is_train("fashion-mnist", split) else "t10k"
    images = _read_idx(folder / f"{prefix}-images-idx3-ubyte", read_image_file)
    labels = _read_idx(folder / f"{prefix}-labels-idx1-ubyte", read_label_file)
    if len(images) != len(labels):
        raise DataError(
            f"{folder} has {len(images)} images and {len(labels)} labels in {prefix}-*: fetch both again"
        )
    return ImageDataset("fashion-mnist", split, FASHION_MNIST_CLASSES, list(images.numpy()), labels.tolist())


def _read_idx(path: Path, read) -> Tensor:
    packed = path.with_name(path.name + ".gz")
    if not path.is_file() and not packed.is_file():
        raise DataError(f"no file {path} or {packed.name}: fetch it from {published.FashionMNIST.mirrors[0]}")
    try:
        if path.is_file():
            return read(path)
        # torchvision reads idx files from a path, unpacked.
        with tempfile.NamedTemporaryFile() as unpacked, gzip.open(packed) as stream:
            shutil.copyfileobj(stream, unpacked)
            unpacked.flush()
            return read(unpacked.name)
    except (OSError, EOFError, ValueError, AssertionError, KeyError, RuntimeError, TypeError) as error:
        reason = str(error) or type(error).__name__
        raise DataError(f"{path} is not an idx file of Fashion-MNIST ({reason}): fetch it again") from error


def _is_train(name: str, split: str) -> bool:
    if split not in ("train", "val", "test"):
        raise DataError(
            f"split={split!r} was given for {name}: use 'train' or 'val' (the published test images)"
        )
    return split == "train"


def _first_folder(*folders: Path) -> Path | None:
    return next((folder for folder in folders if folder.is_dir()), None)


def _fetch(name: str, root: Path, made: str, download: bool, needs: str, fetch) -> None:
    """Let `fetch` make the folder `made`, aside, and move it below `root` once it is whole."""
    if not download:
        raise DataError(f"{name} is not in {root}: fill {needs}, or pass download=True")
    if (root / made).exists():
        raise DataError(f"{root / made} is not complete: delete it, or fill {needs}")
    new = not root.exists()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=root) as aside:
            fetch(aside)
            (Path(aside) / made).rename(root / made)
    except (OSError, RuntimeError) as error:
        if new and root.exists():
            root.rmdir()  # leave no empty folder behind
        reason = str(error).splitlines()[0]
        raise DataError(f"{name} could not be downloaded ({reason}): fill {needs}") from error


NAMED = {"tiny-imagenet": _open_tiny_imagenet, "cifar10": _open_cifar10, "fashion-mnist": _open_fashion_mnist}
