"""ImageNet as people have it -> which images there are, of which class, and where their bytes lie.

Three layouts: folders of classes, the archives of ILSVRC2012 as published, and Kaggle's. Nothing is unpacked:
an image inside an archive is a place in a file, and a tar within a tar only shifts the place.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import quote

import numpy
from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension
from tqdm import tqdm

from cpvt.data.datasets import Shards, open_dataset
from cpvt.data.shards import KEY_BYTES
from cpvt.errors import DataError

TRAIN = "ILSVRC2012_img_train.tar"  # a tar for each class, named by its WordNet id
VAL = "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
META = "data/meta.mat"  # inside the devkit: number <-> WordNet id
TRUTH = "data/ILSVRC2012_validation_ground_truth.txt"  # the number of image 1, 2, ..., one a line
KAGGLE = "ILSVRC/Data/CLS-LOC"
MAPPING = "LOC_synset_mapping.txt"  # Kaggle's classes: WordNet id, then words
SOLUTION = "LOC_val_solution.csv"  # ImageId, then "WordNet-id x y x y ..."
REFUSED_TYPES = {
    "a link": ("islnk", "issym"),
    "a device": ("ischr", "isblk", "isfifo"),
    "sparse": ("issparse",),
}


class Entry(NamedTuple):
    """One image: its name in the shards and in messages, its class, and the place of its bytes."""

    key: str
    name: str
    label: int
    path: str
    offset: int = 0
    length: int = -1  # bytes; -1: the whole file


class Refused(NamedTuple):
    """Something that was found and is not packed."""

    name: str
    reason: str


class Listing(NamedTuple):
    """What one split of a source holds: classes in sorted order, images in the order of the source."""

    classes: tuple[str, ...]
    entries: list[Entry]
    refused: list[Refused]


@dataclass(frozen=True)
class Layout:
    """A way to lay out images; a folder with one of the `signs` in it is laid out this way."""

    name: str
    signs: tuple[str, ...]
    read: Callable[[Path, str], Listing]
    imagenet: bool  # nothing but the whole of ImageNet comes like this


def find_layout(path: Path) -> Layout:
    """How the images below a folder are laid out; DataError where it is none of the known ways."""
    if not path.is_dir():
        raise DataError(f"no folder {path}: give one with {_all_signs()}")
    for layout in LAYOUTS:
        if any((path / sign).exists() for sign in layout.signs):
            return layout
    found = ", ".join(sorted(p.name for p in path.iterdir())[:5]) or "nothing"
    raise DataError(f"{path} has {found}, expected {_all_signs()}: give the folder that holds these")


def _all_signs() -> str:
    return ", or ".join(f"{' / '.join(layout.signs)} ({layout.name})" for layout in LAYOUTS)


def _need(path: Path, layout: str, *names: str) -> list[Path]:
    missing = [name for name in names if not (path / name).exists()]
    if missing:
        raise DataError(f"{path} is laid out as {layout} and lacks {', '.join(missing)}: put it there")
    return [path / name for name in names]


def make_key(wnid: str, stem: str) -> str:
    """CLASS/NAME as a tar entry may be called: no dot, as WebDataset cuts there; ASCII; at most 90 bytes."""
    key = quote(os.fsencode(f"{wnid}/{stem}"), safe="/").replace(".", "%2E")
    if len(key) <= KEY_BYTES:
        return key
    return f"{key[: KEY_BYTES - 17]}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"


# Folders of classes


def _read_folders(path: Path, split: str) -> Listing:
    _need(path, "folders of images", split)
    data = open_dataset(path.resolve(), split)
    if isinstance(data, Shards):
        raise DataError(f"{path / split} is packed already: give the folder of the originals")
    here, entries = path.resolve() / split, []
    for item, label in zip(data.items, data.labels, strict=True):
        folder = here / data.classes[label]
        # Below its class folder an image may lie deeper, as train/CLASS/images/ of Tiny-ImageNet.
        inner = item.relative_to(folder) if item.is_relative_to(folder) else Path(item.name)
        key = make_key(data.classes[label], str(inner.with_suffix("")))
        entries.append(Entry(key, str(path / split / item.relative_to(here)), label, str(item)))
    return Listing(data.classes, entries, [])


# The archives of ILSVRC2012


def _read_archives(path: Path, split: str) -> Listing:
    if split == "val":
        archive, devkit = _need(path, "archives of ILSVRC2012", VAL, DEVKIT)
        return _read_val_archive(archive, *_read_devkit(devkit))
    (archive,) = _need(path, "archives of ILSVRC2012", TRAIN)
    devkit = path / DEVKIT
    return _read_train_archive(archive, sorted(_read_devkit(devkit)[0].values()) if devkit.exists() else None)


def _read_train_archive(path: Path, classes: list[str] | None) -> Listing:
    found, refused = [], []  # (class, image, its place)
    with _open_tar(path) as outer:
        progress = tqdm(
            _plain_members(outer, path.name, refused), "list of train", unit="class", disable=None
        )
        for member in progress:
            wnid, ending = os.path.splitext(PurePosixPath(member.name).name)
            name = f"{path.name}/{member.name}"
            if ending != ".tar" or (classes is not None and wnid not in classes):
                refused.append(Refused(name, "not the archive of a class"))
                continue
            with outer.extractfile(member) as file, _open_tar(path, file, member.name) as inner:
                for image in _images(inner, name, refused):
                    found.append((wnid, image.name, member.offset_data + image.offset_data, image.size))
    classes = sorted({wnid for wnid, *_ in found}) if classes is None else classes
    label = {wnid: i for i, wnid in enumerate(classes)}
    entries = [
        Entry(
            make_key(wnid, PurePosixPath(name).stem),
            f"{path.name}/{wnid}.tar/{name}",
            label[wnid],
            str(path),
            offset,
            length,
        )
        for wnid, name, offset, length in found
    ]
    return Listing(tuple(classes), entries, refused)


def _read_val_archive(path: Path, wnids: dict[int, str], truth: list[int]) -> Listing:
    """The label of ILSVRC2012_val_00000001.JPEG is on line 1 of the devkit's ground truth."""
    classes, entries, refused = tuple(sorted(wnids.values())), [], []
    label = {number: classes.index(wnid) for number, wnid in wnids.items()}
    with _open_tar(path) as archive:
        for image in _images(archive, path.name, refused):
            stem, name = PurePosixPath(image.name).stem, f"{path.name}/{image.name}"
            line = re.fullmatch(r"ILSVRC2012_val_(\d{8})", stem)
            if not line or not 1 <= int(line[1]) <= len(truth):
                refused.append(Refused(name, f"no line in the {len(truth)} of the ground truth"))
                continue
            number = label[truth[int(line[1]) - 1]]
            key = make_key(classes[number], stem)
            entries.append(Entry(key, name, number, str(path), image.offset_data, image.size))
    return Listing(classes, sorted(entries, key=lambda entry: entry.name), refused)


def _read_devkit(path: Path) -> tuple[dict[int, str], list[int]]:
    """ILSVRC number -> WordNet id of the leaves, which are the classes; the number of each validation image."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise DataError(f"{path.name} holds a MATLAB file, which needs scipy: pip install scipy") from None
    try:
        with tarfile.open(path, "r:gz") as archive:
            files = {m.name.partition("/")[2]: m for m in archive if m.isreg()}
            meta, truth = (archive.extractfile(files[name]).read() for name in (META, TRUTH))
        synsets = numpy.atleast_1d(loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"])
        wnids = {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in synsets if s["num_children"] == 0}
        numbers = [int(line) for line in truth.split()]
        unknown = set(numbers) - set(wnids)
    except (
        OSError,
        EOFError,
        tarfile.TarError,
        KeyError,
        ValueError,
        TypeError,
        NotImplementedError,
    ) as error:
        reason = str(error) or type(error).__name__
        raise DataError(
            f"{path} is not the devkit, with {META} and {TRUTH} ({reason}): fetch it again"
        ) from error
    if unknown:
        raise DataError(f"{path}: {TRUTH} has number {min(unknown)}, which {META} lacks: fetch it again")
    return wnids, numbers


def _open_tar(path: Path, file=None, inside: str = "") -> tarfile.TarFile:
    try:
        return tarfile.open(None if file else path, "r:", fileobj=file)
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"{path} {inside} is not a tar that can be read ({error}): fetch it again") from error


def _images(archive: tarfile.TarFile, where: str, refused: list[Refused]) -> Iterator[tarfile.TarInfo]:
    for member in _plain_members(archive, where, refused):
        if has_file_allowed_extension(member.name, IMG_EXTENSIONS):
            yield member
        else:
            refused.append(Refused(f"{where}/{member.name}", "not named as an image"))


def _plain_members(archive: tarfile.TarFile, where: str, refused: list[Refused]) -> Iterator[tarfile.TarInfo]:
    """The plain files of a tar. Others are refused, as are names that would climb out of a folder.

    Nothing is written where a name says, but a tar with such names was not made to be trusted.
    """
    try:
        for member in archive:
            reason = _suspicion(member)
            if reason:
                refused.append(Refused(f"{where}/{member.name}", reason))
            elif not member.isdir():
                yield member
        # tarfile takes a damaged header for the end; the end is a block of zeros.
        archive.fileobj.seek(archive.offset)
        if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"no end where it is expected, at byte {archive.offset}")
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"{where} is damaged or cut short ({error}): fetch it again") from error


def _suspicion(member: tarfile.TarInfo) -> str:
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts:
        return "climbs out of its folder"
    for reason, tests in REFUSED_TYPES.items():
        if any(getattr(member, test)() for test in tests):
            return reason
    return ""


# Kaggle's layout


def _read_kaggle(path: Path, split: str) -> Listing:
    folder, mapping = _need(path, "Kaggle's ImageNet", f"{KAGGLE}/{split}", MAPPING)
    classes = tuple(sorted(line.split()[0] for line in mapping.read_text().splitlines() if line.strip()))
    if split == "train":
        listing = _read_folders(folder.parent, split)
        if listing.classes != classes:
            odd = min(set(listing.classes) ^ set(classes))
            raise DataError(
                f"{folder} and {mapping} differ in their classes (the first: {odd}): unpack both again"
            )
        return listing
    (solution,) = _need(path, "Kaggle's ImageNet", SOLUTION)
    entries, label = [], {wnid: i for i, wnid in enumerate(classes)}
    with open(solution, newline="", encoding="utf-8") as lines:
        for line, row in enumerate(csv.DictReader(lines), start=2):
            name, wnid = row.get("ImageId") or "", (row.get("PredictionString") or "").partition(" ")[0]
            if wnid not in label or not name or "/" in name:
                raise DataError(f"{solution}, line {line}: {name!r} of class {wnid!r}, which {mapping} lacks")
            file = folder / f"{name}.JPEG"
            entries.append(Entry(make_key(wnid, name), str(file), label[wnid], str(file.resolve())))
    listed = {entry.name for entry in entries}
    others = sorted(str(p) for p in folder.iterdir() if str(p) not in listed)
    refused = [Refused(name, f"not in {SOLUTION}") for name in others]
    return Listing(classes, sorted(entries, key=lambda entry: entry.name), refused)


LAYOUTS = (
    Layout("archives of ILSVRC2012", (TRAIN, VAL, DEVKIT), _read_archives, True),
    Layout("Kaggle's ImageNet", (KAGGLE,), _read_kaggle, True),
    Layout("folders of images", ("train", "val"), _read_folders, False),
)
