"""Shards: images in a few large tar files, with an index that says where each one lies.

A folder holds one split: 000000.tar, 000001.tar, ..., index.json (what it is) and index.npz (where each image
lies). The shards are plain WebDataset: CLASS/NAME.jpg with the bytes of an image, then CLASS/NAME.cls with the
number of its class as text. Image i is read with one system call, in any order.

Letters: n images.
"""

from __future__ import annotations

import copy
import fcntl
import hashlib
import io
import json
import math
import os
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from cpvt.errors import DataError

VERSION = 1
COLUMNS = {"shard": "<i4", "offset": "<i8", "length": "<i8", "label": "<i4", "height": "<i4", "width": "<i4"}
BLOCK, RECORD = tarfile.BLOCKSIZE, tarfile.RECORDSIZE  # a tar pads each file to 512 bytes, itself to 10,240
KEY_BYTES = 90  # with an ending it fits the 100 bytes of a plain header, which stands right before the image
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


class Shards(Dataset):
    """Pairs (PIL image in RGB, label), or the bytes of an image as stored, from a folder of shards.

    labels      (n,) int64, an index into `classes`, which are WordNet ids in sorted order
    sizes       (n, 2) int64: height and width of the stored image in pixels, EXIF ignored
    short_side  pixels to which larger images were shrunk; 0: they are the originals
    about       all of index.json: also what was refused, and why

    Safe to use from threads and after a fork; a pickled copy opens its files anew. Raises DataError for a
    folder that is not whole.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.about = _read_about(self.path)
        self.name, self.split = self.about["name"], self.about["split"]
        self.classes = tuple(self.about["classes"])
        self.short_side = self.about["short_side"]
        files = [self.path / shard["name"] for shard in self.about["shards"]]
        for file, shard in zip(files, self.about["shards"], strict=True):
            bytes_there = file.stat().st_size if file.is_file() else None
            if bytes_there != shard["bytes"]:
                there = "is missing" if bytes_there is None else f"has {bytes_there} bytes"
                raise DataError(f"{file} {there}, expected {shard['bytes']} bytes: copy or pack it again")
        columns = _read_columns(self.path, self.about)
        self.labels = columns["label"]
        self.sizes = torch.stack((columns["height"], columns["width"]), dim=1)
        self._place = torch.stack([columns[name] for name in ("shard", "offset", "length")], dim=1)
        self._files = _Files(files)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return decode(io.BytesIO(self.read(i)), f"{self.path}: {self.key(i)}"), int(self.labels[i])

    def read(self, i: int) -> bytes:
        """The bytes of image i as stored."""
        shard, offset, length = self._place[i].tolist()
        return self._files.read(shard, offset, length)

    def key(self, i: int) -> str:
        """CLASS/NAME of image i, read from the tar header before it."""
        shard, offset, _ = self._place[i].tolist()
        header = self._files.read(shard, offset - BLOCK, BLOCK)
        return header[: header.index(b"\0")].decode().rpartition(".")[0]

    def select(self, index) -> Shards:
        """The images at these indices, in this order, with all classes."""
        index = torch.as_tensor([int(i) for i in index], dtype=torch.int64)
        chosen = copy.copy(self)
        chosen.__dict__.pop("fingerprint", None)
        for name in ("labels", "sizes", "_place"):
            setattr(chosen, name, getattr(self, name)[index])
        return chosen

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, over classes, shards (by their own hashes), places and labels."""
        head = repr((self.classes, [shard["sha256"] for shard in self.about["shards"]]))
        digest = hashlib.sha256(head.encode())
        digest.update(self._place.numpy())
        digest.update(self.labels.numpy())
        return digest.hexdigest()

    def verify(self) -> None:
        """Reads every shard and compares its hash: all bytes are those that were packed, or DataError."""
        changed = []
        for shard in self.about["shards"]:
            with open(self.path / shard["name"], "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != shard["sha256"]:
                    changed.append(shard["name"])
        if changed:
            raise DataError(
                f"{self.path}: {len(changed)} of {len(self.about['shards'])} shards do not have the SHA-256 of "
                f"the index (the first: {changed[0]}): copy or pack them again"
            )


class _Files:
    """Files opened when first read. `os.pread` keeps no position, so threads and forks may share them."""

    def __init__(self, paths: list[Path]):
        self.paths, self.opened = paths, {}

    def read(self, number: int, offset: int, length: int) -> bytes:
        try:
            data = os.pread(self._open(number), length, offset)
            while 0 < len(data) < length:  # Linux gives at most 2 GiB at a time
                more = os.pread(self._open(number), length - len(data), offset + len(data))
                if not more:
                    break
                data += more
        except OSError as error:
            raise DataError(
                f"{self.paths[number]} cannot be read ({error.strerror}), byte {offset}"
            ) from error
        if len(data) < length:
            raise DataError(f"{self.paths[number]} ends before byte {offset + length}: copy or pack it again")
        return data

    def _open(self, number: int) -> int:
        if number in self.opened:
            return self.opened[number]
        file = os.open(self.paths[number], os.O_RDONLY)
        kept = self.opened.setdefault(number, file)  # of two threads at once, one is the first
        if kept != file:
            os.close(file)
        return kept

    def __getstate__(self) -> dict:
        return {"paths": self.paths, "opened": {}}

    def __del__(self):
        for file in self.opened.values():
            os.close(file)


@contextmanager
def opened(source, name: str) -> Iterator[Image.Image]:
    """A path or an open file as a Pillow image; what cannot be read raises DataError with its name."""
    try:
        with Image.open(source) as image:
            yield image
    except _UNREADABLE as error:
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "of no format that Pillow knows" if unknown else str(error).splitlines()[0]
        raise DataError(
            f"{name} is not an image that can be read ({reason}): replace or delete it"
        ) from error


def decode(source, name: str) -> Image.Image:
    """A path or an open file -> the image in RGB. EXIF is ignored, as in torchvision's `default_loader`."""
    with opened(source, name) as image:
        return image.convert("RGB")


# Resolution


def stored_side_needed(image_size: int | tuple[int, int], crop_fraction: float = 0.875) -> int:
    """The short side, in pixels, to which evaluation at `image_size` resizes before it cuts out the centre."""
    side = image_size if isinstance(image_size, int) else max(image_size)
    return math.floor(side / crop_fraction)


def check_resolution(
    dataset, image_size: int | tuple[int, int], allow: bool = False, crop_fraction: float = 0.875
) -> float:
    """The share of images, 0 to 1, that evaluation at `image_size` has to enlarge.

    dataset  anything with `sizes` (n, 2): Shards or an ImageDataset of files
    allow    accept shards that were shrunk below what this needs, which otherwise raise DataError: an
             enlarged image shows blur, and a model's answer to blur is not its answer to resolution
    """
    needed, stored = stored_side_needed(image_size, crop_fraction), getattr(dataset, "short_side", 0)
    if 0 < stored < needed and not allow:
        raise DataError(
            f"{dataset.path} holds images shrunk to a short side of {stored} pixels, size {image_size} needs "
            f"{needed}: evaluate on originals, pack with --short-side {needed} or more, or allow enlarging"
        )
    return (dataset.sizes.amin(dim=1) < needed).double().mean().item()


# Writing


class ShardWriter:
    """Writes images one behind the other into numbered tars; the same images give the same bytes."""

    def __init__(self, folder: Path, shard_bytes: int):
        self.folder, self.limit = folder, shard_bytes
        self.rows = {name: [] for name in COLUMNS}
        self.shards, self.file, self.images = [], None, 0

    def add(self, key: str, ending: str, data: bytes, label: int, height: int, width: int) -> None:
        text = str(label).encode()
        if self.file and self.size + 3 * BLOCK + len(data) > self.limit:
            self._finish()
        if not self.file:
            self.file = _create(self.folder / f"{len(self.shards):06}.tar")
            self.size, self.images, self.digest = 0, 0, hashlib.sha256()
        row = (len(self.shards), self.size + BLOCK, len(data), label, height, width)
        for name, value in zip(COLUMNS, row, strict=True):
            self.rows[name].append(value)
        for name, content in ((f"{key}.{ending}", data), (f"{key}.cls", text)):
            entry = tarfile.TarInfo(name)  # owner and times stay 0
            entry.size = len(content)
            self._write(entry.tobuf(tarfile.USTAR_FORMAT))
            self._write(content)
            self._write(bytes(-len(content) % BLOCK))
        self.images += 1

    def close(self, **about) -> dict:
        """Writes the index, with what `about` says of the images, and returns it."""
        if self.file:
            self._finish()
        columns = {name: numpy.array(self.rows[name], dtype=kind) for name, kind in COLUMNS.items()}
        index = io.BytesIO()
        numpy.savez(index, **columns)
        with _create(self.folder / "index.npz") as file:
            _flush(file, index.getbuffer())
        about = {
            "format": "cpvt shards",
            "version": VERSION,
            **about,
            "images": len(columns["label"]),
            "min_side": min(self.rows["height"] + self.rows["width"], default=0),  # pixels
            "shards": self.shards,
            "index_sha256": hashlib.sha256(index.getbuffer()).hexdigest(),
        }
        with _create(self.folder / "index.json") as file:
            _flush(file, json.dumps(about, indent=1).encode())
        return about

    def _write(self, content: bytes) -> None:
        self.file.write(content)
        self.digest.update(content)
        self.size += len(content)

    def _finish(self) -> None:
        self._write(bytes(2 * BLOCK))  # the end of a tar
        self._write(bytes(-self.size % RECORD))
        with self.file as file:
            _flush(file)
        name = f"{len(self.shards):06}.tar"
        entry = {"name": name, "images": self.images, "bytes": self.size, "sha256": self.digest.hexdigest()}
        self.shards.append(entry)
        self.file = None


@contextmanager
def written_aside(target: Path) -> Iterator[Path]:
    """A hidden folder beside `target`, which is renamed to it when all is written.

    After an error nothing is left. What a killed process leaves has the hidden name, and is deleted by the
    next one that writes the same target. Raises DataError where `target` is there, where another process is
    writing it, and for a disk that is full.
    """
    if target.exists() or target.is_symlink():
        raise DataError(f"{target} exists: delete it, or choose another folder")
    aside = target.with_name(f".{target.name}.unfinished")
    new = not target.parent.exists()
    try:
        aside.mkdir(parents=True, exist_ok=True)
        lock = os.open(aside, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not aside.exists() or os.stat(aside).st_ino != os.fstat(lock).st_ino:
                raise BlockingIOError  # the other one finished just now
        except BlockingIOError:
            os.close(lock)
            raise DataError(f"{target} is being written by another process: wait for it") from None
        try:
            for left in aside.iterdir():
                left.unlink()
            yield aside
            os.fsync(lock)
            aside.rename(target)
            _sync_folder(target.parent)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            if new and not any(target.parent.iterdir()):
                target.parent.rmdir()  # leave no empty folder behind
            raise
        finally:
            os.close(lock)
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(
            f"{target} could not be written ({reason}), nothing was kept: look at its room and "
            f"permissions, or choose another folder"
        ) from error


def _create(path: Path):
    return open(path, "wb", buffering=1 << 20)


def _flush(file, content=b"") -> None:
    """Writes, and comes back when the disk has it."""
    file.write(content)
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


# Reading the index


def _read_about(path: Path) -> dict:
    file = path / "index.json"
    try:
        about = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{file} is not the index of shards ({error}): copy or pack it again") from error
    if not isinstance(about, dict) or about.get("format") != "cpvt shards":
        raise DataError(f"{file} is not the index of shards that `cpvt pack` wrote: choose another folder")
    if about["version"] != VERSION:
        raise DataError(f"{file} has version {about['version']}, expected {VERSION}: pack the images again")
    return about


def _read_columns(path: Path, about: dict) -> dict[str, Tensor]:
    file = path / "index.npz"
    data = file.read_bytes() if file.is_file() else b""
    if hashlib.sha256(data).hexdigest() != about["index_sha256"]:
        raise DataError(f"{file} is not the one that index.json describes: copy or pack both again")
    with numpy.load(io.BytesIO(data), allow_pickle=False) as columns:
        return {name: torch.from_numpy(columns[name].astype(numpy.int64)) for name in COLUMNS}
