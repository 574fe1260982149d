"""Images and labels by path or name: folders, shards, Tiny-ImageNet. n: images; H, W: pixels down and across."""

import hashlib
import os
import tempfile
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Self
from unicodedata import normalize

import numpy
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cpvt.config import Grid, local_path, pair
from cpvt.data.decode import ENDINGS, decode_image, reason, regular
from cpvt.data.shards import Shards, new_folder
from cpvt.data.transforms import centre_resize
from cpvt.errors import DataError, typed

NAMED = {"tiny-imagenet": "tiny-imagenet-200"}  # its folder below `root`
TINY_IMAGENET = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
TINY_IMAGENET_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
SAMPLED = 64  # images whose bytes count in a fingerprint


@dataclass(frozen=True)
class ImageDataset(Dataset):
    """Pairs (image (3, h, w) uint8, label), each image decoded when it is asked for.

    items    paths as bytes, in one array: a million Python objects would be copied, page by page, into every
             process that reads
    labels   (n,) int64, an index into `classes`
    classes  names of folders, for ImageNet WordNet ids, in sorted order
    others   files that are passed over because their names are not an image's, counted by their endings
    """

    name: str
    split: str
    classes: tuple[str, ...] = field(repr=False)
    items: numpy.ndarray = field(repr=False)
    labels: Tensor = field(repr=False)
    others: Counter = field(default_factory=Counter, repr=False)

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
        """SHA-256, in hexadecimal, over classes, labels, the names of the files, wherever their folder lies, and
        the bytes of SAMPLED of them, evenly spread.

        So a million files cost seconds. Where all images are replaced under their names, it is another one;
        where a tenth is, nearly always (1 - 0.9^64); where a few of a million are, hardly ever.
        """
        digest = hashlib.sha256(repr(self.classes).encode())
        for item, label in zip(self.items.tolist(), self.labels.tolist(), strict=True):
            digest.update(b"/".join(item.rsplit(b"/", 2)[-2:]) + b"\t%d\n" % label)
        for i in torch.linspace(0, len(self) - 1, min(SAMPLED, len(self))).long().tolist():
            with suppress(OSError, DataError):  # what cannot be read is named where it is used
                digest.update(hashlib.sha256(self.read(i)).digest())
        return digest.hexdigest()

    def select(self, index: Iterable[int]) -> Self:
        """The images at these indices, in this order, with all classes."""
        index = torch.as_tensor(index)
        return replace(self, items=self.items[index.numpy()], labels=self.labels[index])


@dataclass(frozen=True)
class ImageTensors:
    """A data set in memory: images (n, 3, H, W) uint8, labels (n,) int64."""

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    others: Counter = field(default_factory=Counter)  # as in the files they were decoded from

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over shape, classes, labels and pixels, in hexadecimal: equal for equal data alone."""
        digest = hashlib.sha256(repr((tuple(self.images.shape), tuple(self.classes))).encode())
        digest.update(self.labels.cpu().contiguous().numpy())
        digest.update(self.images.cpu().contiguous().numpy())
        return digest.hexdigest()


def load_tensors(dataset: ImageDataset | Shards, size: int | Grid) -> ImageTensors:
    """Decode a data set into memory, as `centre_resize` to (H, W) or a square: 3 n H W bytes."""
    high, wide = pair(size)
    try:
        images = torch.empty(len(dataset), 3, high, wide, dtype=torch.uint8)
    except RuntimeError as error:
        given = f"{len(dataset):,} images of {high:,} x {wide:,} pixels"
        raise DataError(f"{given} do not fit into memory: give --data.store files") from error
    for i in range(len(dataset)):
        try:
            image, _ = dataset[i]
        except (DataError, OSError, MemoryError) as error:
            raise DataError(f"{dataset.key(i)} cannot be read ({reason(error)}): replace it") from error
        images[i] = centre_resize(image[None], size)[0]
    return ImageTensors(images, dataset.labels.clone(), tuple(dataset.classes), dataset.others)


@typed
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
    name, path = str(name_or_path), Path(local_path(name_or_path))
    if name in NAMED:
        return _read_folder(_fetched(name, Path(local_path(root))), split, name)
    if not path.is_dir():
        raise DataError(f"no folder and no data set {name!r}; those known by name: {', '.join(NAMED)}")
    packed = (path / split / "index.json").is_file()
    return Shards(path / split) if packed else _read_folder(path, split, path.name)


def refuse_among_images(out: str | Path, source: str | Path) -> None:
    """Raises DataError for a folder below a split of `source`: what is written there would become a class."""
    if os.path.relpath(os.path.realpath(out), os.path.realpath(source)).split(os.sep)[0] in ("train", "val"):
        raise DataError(f"{out} lies among the images of {source}: give another folder")


def in_words(others: Counter) -> str:
    """For people: "200 .txt, 3 .avif", the most frequent endings first."""
    shown = [f"{n:,} {ascii(ending)[1:-1] or 'without ending'}" for ending, n in others.most_common(8)]
    return ", ".join(shown) + (", ..." if len(others) > len(shown) else "")


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _read_folder(path: Path, split: str, name: str) -> ImageDataset:
    """<path>/<split>/<class>/**/*.JPEG, or Tiny-ImageNet's val/images with its val_annotations.txt."""
    here = path / split
    if not here.is_dir():
        found = ", ".join([*_folders(path).values()][:8]) or "none"
        raise DataError(f"{path} has no folder {split!r} (folders: {found})")
    # The classes are those of train/, whatever the split, or labels would mean different things.
    known, own = _folders(path / "train" if (path / "train").is_dir() else here), _folders(here)
    classes, expected = tuple(known.values()), f"expected {here}/<class>/*.JPEG, the same in every split"
    if (here / "val_annotations.txt").is_file():
        return _read_annotated(here, name, classes)
    loose = Counter(_ending(n) for n in os.listdir(here) if n[0] != "." and not (here / n).is_dir())
    flat = sum(loose[ending] for ending in ENDINGS)
    if flat and not own:
        raise DataError(f"{here} holds {flat:,} images and no class folders: move each into {here}/<class>/")
    if odd := [own[key] for key in own if key not in known]:
        raise DataError(f"{here} has {len(odd)} classes that train lacks (the first: {odd[0]}): {expected}")
    if not known:
        raise DataError(f"{here} has no class folders: {expected}")
    others = Counter({f"{ending} beside the class folders": count for ending, count in loose.items()})
    items, labels = [], []
    for label, key in enumerate(known):
        files = _files(here / own[key]) if key in own else []
        images = [os.fsencode(file) for file in files if _ending(file) in ENDINGS]
        if not images:
            beside = f"; {flat:,} images lie beside it" if flat else ""
            words = f"holds no images ({' '.join(ENDINGS)}){beside}: every class needs some"
            raise DataError(f"{here / known[key]} {words}")
        items += images
        labels += [label] * len(images)
        others.update(ending for ending in map(_ending, files) if ending not in ENDINGS)
    return ImageDataset(name, split, classes, numpy.array(items), torch.tensor(labels), others)


def _read_annotated(here: Path, name: str, classes: tuple[str, ...]) -> ImageDataset:
    """Tiny-ImageNet's validation images, one a line of val_annotations.txt: its name, a tab, its class."""
    text = (here / "val_annotations.txt").read_text("utf-8-sig", "surrogateescape")
    rows = [(*row.split("\t"), "")[:2] for row in text.split("\n") if row]
    files = [here / "images" / file for file, _ in rows]
    for file, (_, wnid) in zip(files, rows, strict=True):
        if not file.is_file() or wnid not in classes:
            raise DataError(f"{file} or its class is listed, but not there: unpack all of it again")
    others = Counter(map(_ending, set(_files(here / "images")) - set(map(str, files))))
    items, labels = numpy.array([*map(os.fsencode, files)]), [classes.index(wnid) for _, wnid in rows]
    return ImageDataset(name, here.name, classes, items, torch.tensor(labels), others)


def _files(folder: Path) -> list[str]:
    """The paths of all files below a class folder, sorted part by part, without what is hidden.

    Links are followed, but not up to where other classes lie, and each folder is entered once, in the order of
    names.
    """
    split = os.path.realpath(folder.parent)
    found, entered = [], {split, *map(str, Path(split).parents)}
    for here, folders, names in os.walk(folder, onerror=_refuse, followlinks=True):
        if (real := os.path.realpath(here)) in entered:
            folders.clear()
            continue
        entered.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [os.path.join(here, name) for name in names if not name.startswith(".")]
    return sorted(found, key=lambda path: path.split(os.sep))


def _refuse(error: OSError) -> None:
    raise DataError(f"{error.filename} cannot be read ({reason(error)}): mend or delete it") from error


def _folders(path: Path) -> dict[str, str]:
    """The names of the folders in `path`, sorted, by one spelling of each: some file systems write an accent as a
    letter of its own, others do not."""
    names = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and entry.name[0] != ".")
    found = {normalize("NFC", name): name for name in names}
    if len(found) < len(names):
        raise DataError(f"{path} holds two folders of one name, its accents spelt in two ways: join them")
    return found


def _fetched(name: str, root: Path) -> Path:
    """The folder of a data set known by name; downloaded, whole or not at all, where it is not there."""
    from torchvision.datasets.utils import download_and_extract_archive  # takes a second

    folder = root / NAMED[name]
    try:
        if not folder.is_dir():
            with new_folder(root), tempfile.TemporaryDirectory(prefix=".unpacked-", dir=root) as aside:
                download_and_extract_archive(TINY_IMAGENET, aside, md5=TINY_IMAGENET_MD5)
                Path(aside, NAMED[name]).rename(folder)
    except (RuntimeError, OSError, ValueError, EOFError) as error:
        raise DataError(f"{name} cannot be fetched ({reason(error)}): fill {folder}") from error
    return folder
