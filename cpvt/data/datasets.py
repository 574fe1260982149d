"""Images and labels by path or name: folders, shards, Tiny-ImageNet. n: images; S: pixels a side."""

import hashlib
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cpvt.data.decode import ENDINGS, decode_image, reason, regular
from cpvt.data.shards import Shards
from cpvt.data.transforms import centre_resize
from cpvt.errors import DataError

NAMED = {"tiny-imagenet": "tiny-imagenet-200"}  # its folder below `root`
TINY_IMAGENET = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
TINY_IMAGENET_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"


@dataclass(frozen=True)
class ImageDataset(Dataset):
    """Pairs (image (3, h, w) uint8, label), each image decoded when it is asked for.

    items    paths as bytes, in one array: a million Python objects would be copied, page by page, into every
             process that reads
    labels   (n,) int64, an index into `classes`
    classes  names of folders, for ImageNet WordNet ids, in sorted order
    others   number of files that are left out because their names are not an image's
    """

    name: str
    split: str
    classes: tuple[str, ...] = field(repr=False)
    items: numpy.ndarray = field(repr=False)
    labels: Tensor = field(repr=False)
    others: int = 0

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return decode_image(self.read(i)), int(self.labels[i])

    def path(self, i: int) -> Path:
        return Path(os.fsdecode(self.items[i]))

    def key(self, i: int) -> str:
        """What image i is called in a report."""
        return str(self.path(i))

    def read(self, i: int) -> bytes:
        """The bytes of image i as its file holds them; OSError or DataError where that is impossible."""
        return regular(self.path(i)).read_bytes()

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, over classes, labels and the names of the files, wherever their folder lies."""
        digest = hashlib.sha256(repr(self.classes).encode())
        for i, label in enumerate(self.labels.tolist()):
            digest.update(os.fsencode("/".join(self.path(i).parts[-2:]) + f"\t{label}\n"))
        return digest.hexdigest()

    def select(self, index: Iterable[int]) -> Self:
        """The images at these indices, in this order, with all classes."""
        index = torch.as_tensor(index)
        return replace(self, items=self.items[index.numpy()], labels=self.labels[index])


@dataclass(frozen=True)
class ImageTensors:
    """A data set in memory: images (n, 3, S, S) uint8, labels (n,) int64."""

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over shape, classes, labels and pixels, in hexadecimal: equal for equal data alone."""
        digest = hashlib.sha256(repr((tuple(self.images.shape), tuple(self.classes))).encode())
        digest.update(self.labels.cpu().contiguous().numpy())
        digest.update(self.images.cpu().contiguous().numpy())
        return digest.hexdigest()


def load_tensors(dataset: ImageDataset | Shards, size: int) -> ImageTensors:
    """Decode a data set into memory: short side to `size` pixels, centre square; 3 n size^2 bytes."""
    images = torch.empty(len(dataset), 3, size, size, dtype=torch.uint8)
    for i in range(len(dataset)):
        try:
            image, _ = dataset[i]
        except (DataError, OSError) as error:
            raise DataError(f"{dataset.key(i)} cannot be read ({reason(error)}): replace it") from error
        images[i] = centre_resize(image[None], size)[0]
    return ImageTensors(images, dataset.labels.clone(), tuple(dataset.classes))


def open_dataset(
    name_or_path: str | Path, split: str = "train", root: str | Path = "data/images"
) -> ImageDataset | Shards:
    """Open one split of a data set.

    name_or_path  a folder: what `cpvt pack` wrote, <split>/<class>/*.JPEG as ImageNet, or Tiny-ImageNet as
                  published; or "tiny-imagenet"
    split         "train", "val", or another that the folder has
    root          the folder that holds what is known by name; what it lacks is downloaded

    Raises DataError where something is missing, with the folder to fill.
    """
    name, path = str(name_or_path), Path(name_or_path).expanduser()
    if name in NAMED:
        path = _fetched(name, Path(root).expanduser())
        return _read_folder(path, split, name)
    if not path.is_dir():
        raise DataError(f"no folder and no data set {name!r}; those known by name: {', '.join(NAMED)}")
    packed = (path / split / "index.json").is_file()
    return Shards(path / split) if packed else _read_folder(path, split, path.name)


def _read_folder(path: Path, split: str, name: str) -> ImageDataset:
    """<path>/<split>/<class>/**/*.JPEG, or Tiny-ImageNet's val/images with its val_annotations.txt."""
    here = path / split
    if not here.is_dir():
        raise DataError(f"{path} has no folder {split!r} (folders: {', '.join(_folders(path)) or 'none'})")
    # The classes are those of train/, whatever the split, or labels would mean different things.
    classes = _folders(path / "train" if (path / "train").is_dir() else here)
    annotations = here / "val_annotations.txt"
    if annotations.is_file():
        rows = [row.split("\t") for row in annotations.read_text().splitlines()]
        files = [here / "images" / row[0] for row in rows]
        if lost := [
            f for f, row in zip(files, rows, strict=True) if not f.is_file() or row[1] not in classes
        ]:
            raise DataError(f"{lost[0]} or its class is listed, but not there: unpack all of it again")
        labels = torch.tensor([classes.index(row[1]) for row in rows])
        return ImageDataset(name, split, tuple(classes), numpy.array([os.fsencode(f) for f in files]), labels)
    odd = sorted(set(_folders(here)) - set(classes))
    if odd or not classes:
        found = f"{len(odd)} classes that train lacks (the first: {odd[0]})" if odd else "no class folders"
        raise DataError(f"{here} has {found}: expected {here}/<class>/*.JPEG, the same in every split")
    items, labels, others = [], [], 0
    for label, wnid in enumerate(classes):
        files = _files(here / wnid)
        images = [os.fsencode(file) for file in files if file.lower().endswith(ENDINGS)]
        if not images:
            raise DataError(f"{here / wnid} holds no images ({' '.join(ENDINGS)}): every class needs some")
        items += images
        labels += [label] * len(images)
        others += len(files) - len(images)
    return ImageDataset(name, split, tuple(classes), numpy.array(items), torch.tensor(labels), others)


def _files(folder: Path) -> list[str]:
    """The paths of all files below a class folder, sorted part by part, without what is hidden.

    Links are followed, and each folder is entered once: a link may lead back up.
    """
    found, entered = [], set()
    for here, folders, names in os.walk(folder, onerror=_refuse, followlinks=True):
        if (real := os.path.realpath(here)) in entered:
            folders.clear()
            continue
        entered.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [os.path.join(here, name) for name in names if not name.startswith(".")]
    return sorted(found, key=lambda path: path.split(os.sep))


def _refuse(error: OSError) -> None:
    raise DataError(f"{error.filename} cannot be read ({reason(error)}): mend or delete it") from error


def _folders(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir() if entry.is_dir() and entry.name[0] != ".")


def _fetched(name: str, root: Path) -> Path:
    """The folder of a data set known by name; downloaded, whole or not at all, where it is not there."""
    from torchvision.datasets.utils import download_and_extract_archive  # takes a second

    folder = root / NAMED[name]
    try:
        if not folder.is_dir():
            root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".unpacked-", dir=root) as aside:
                download_and_extract_archive(TINY_IMAGENET, aside, md5=TINY_IMAGENET_MD5)
                Path(aside, NAMED[name]).rename(folder)
    except (RuntimeError, OSError, ValueError, EOFError) as error:
        raise DataError(f"{name} cannot be fetched ({reason(error)}): fill {folder}") from error
    return folder
