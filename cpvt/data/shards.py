"""Shards: images in a few large tar files, with an index that says where each one lies.

A folder holds one split: 000000.tar, 000001.tar, ..., index.json (what it is) and index.npz (where each image
lies). The shards are plain WebDataset: CLASS/NAME.jpg with the bytes of an image, then CLASS/NAME.cls with the
number of its class as text. Image i is read with one system call, in any order.
"""

import copy
import hashlib
import io
import json
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cpvt.data.decode import MAX_BYTES, decode_image, reason, regular
from cpvt.errors import DataError

FORMAT = {"format": "cpvt shards", "version": 1}
COLUMNS = {"shard": "<i4", "offset": "<i8", "length": "<i8", "label": "<i4"}
BLOCK = tarfile.BLOCKSIZE  # a tar pads each file to 512 bytes and puts a header of as many before it
KEY_BYTES = 90  # with an ending it fits the 100 bytes of a plain header, which stands right before the image


class Shards(Dataset):
    """Pairs (image (3, h, w) uint8, label), or the bytes of an image as stored, from a folder of shards.

    labels  (n,) int64, an index into `classes`, which are WordNet ids in sorted order
    about   all of index.json: also what was refused, and why

    Safe to use from threads and after a fork; a pickled copy opens its files anew. Raises DataError for a
    folder that is not whole.
    """

    others = Counter()  # files beside the images: what is packed has none

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.about, table = _read_index(self.path)
        self.classes = tuple(self.about["classes"])
        self._spans, self.labels = table[:, :3].contiguous(), table[:, 3].contiguous()
        self._opened: dict[int, io.FileIO] = {}

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return decode_image(self.read(i)), int(self.labels[i])

    def read(self, i: int) -> bytes:
        """The bytes of image i as stored; OSError or DataError where that is impossible."""
        return self._read(*self._spans[i].tolist())

    def key(self, i: int) -> str:
        """CLASS/NAME of image i, from the tar header before it; where that is damaged, its shard and place."""
        shard, offset, _ = self._spans[i].tolist()
        try:
            header = tarfile.TarInfo.frombuf(self._read(shard, offset - BLOCK, BLOCK), "ascii", "replace")
            return header.name.rpartition(".")[0]
        except (OSError, DataError, tarfile.TarError):
            return f"{self.about['shards'][shard]['name']}, byte {offset}"

    def _read(self, shard: int, offset: int, length: int) -> bytes:
        file = self.path / self.about["shards"][shard]["name"]
        if shard not in self._opened:  # of two threads at once, one is the first
            self._opened.setdefault(shard, open(file, "rb", buffering=0))
        # Keeps no position, so threads and forks may share a file.
        data = os.pread(self._opened[shard].fileno(), length, offset)
        if len(data) < length:
            raise DataError(f"{file} ends before byte {offset + length}: copy or pack it again")
        return data

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_opened": {}}

    def select(self, index) -> Self:
        """The images at these indices, in this order, with all classes."""
        index = torch.as_tensor(index)
        chosen = copy.copy(self)
        chosen.__dict__.pop("fingerprint", None)
        chosen.labels, chosen._spans = self.labels[index], self._spans[index]
        return chosen

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, over classes, shards (by their own hashes), places and labels."""
        head = repr((self.classes, [shard["sha256"] for shard in self.about["shards"]]))
        digest = hashlib.sha256(head.encode())
        digest.update(self._spans.numpy())
        digest.update(self.labels.numpy())
        return digest.hexdigest()


def _read_index(path: Path) -> tuple[dict, Tensor]:
    """index.json, and the columns of index.npz, (n, 4) int64; DataError where they or the shards are not what was
    packed."""
    file = path / "index.json"
    try:
        about = json.loads(regular(file).read_bytes())
        if {name: about[name] for name in FORMAT} != FORMAT:
            raise ValueError(f"format {about['format']!r}, version {about['version']}")
        sizes = torch.tensor([shard["bytes"] for shard in about["shards"]], dtype=torch.int64)
        for shard in about["shards"]:
            file = path / shard["name"]
            if file.stat().st_size != shard["bytes"]:
                raise ValueError(f"{file.stat().st_size} bytes, not {shard['bytes']}")
        file = path / "index.npz"
        data = regular(file).read_bytes()
        if hashlib.sha256(data).hexdigest() != about["index_sha256"]:
            raise ValueError("another hash than index.json says")
        with numpy.load(io.BytesIO(data)) as columns:
            table = torch.from_numpy(numpy.stack([columns[name].astype(numpy.int64) for name in COLUMNS], 1))
        shard, offset, length, label = table.unbind(1)
        fits = (shard >= 0) & (shard < len(sizes)) & (label >= 0) & (label < len(about["classes"]))
        fits &= (offset >= BLOCK) & (length > 0) & (length <= MAX_BYTES)
        fits &= offset <= sizes[shard.clamp(0, len(sizes) - 1)] - length
        if len(fits) != about["images"] or not fits.all():
            raise ValueError(f"{int(fits.sum())} of {about['images']} images lie within the shards")
    except Exception as error:  # whatever a damaged index may cause
        raise DataError(f"{file} is not what was packed ({reason(error)}): copy or pack it again") from error
    return about, table


class ShardWriter:
    """Writes images one behind the other into numbered tars; the same images give the same bytes."""

    def __init__(self, folder: Path, shard_bytes: int = 10**9):
        self.folder, self.limit = folder, shard_bytes
        self.rows: list[tuple] = []
        self.shards: list[dict] = []
        self.archive = None

    def add(self, key: str, ending: str, data: bytes, label: int) -> None:
        if self.archive and self.archive.offset + 3 * BLOCK + len(data) > self.limit:
            self._finish()
        if not self.archive:
            file = self.folder / f"{len(self.shards):06}.tar"
            self.archive = tarfile.open(file, "w", format=tarfile.USTAR_FORMAT)
        self.rows.append((len(self.shards), self.archive.offset + BLOCK, len(data), label))
        for name, content in ((f"{key}.{ending}", data), (f"{key}.cls", str(label).encode())):
            entry = tarfile.TarInfo(name)  # owner and times stay 0
            entry.size = len(content)
            self.archive.addfile(entry, io.BytesIO(content))

    def close(self, **about) -> dict:
        """Writes the index, with what `about` says of the images, and returns it."""
        if self.archive:
            self._finish()
        rows, index = numpy.array(self.rows).reshape(-1, len(COLUMNS)), io.BytesIO()
        numpy.savez(index, **{name: rows[:, i].astype(COLUMNS[name]) for i, name in enumerate(COLUMNS)})
        about = {**FORMAT, **about, "images": len(rows), "shards": self.shards}
        about["index_sha256"] = hashlib.sha256(index.getbuffer()).hexdigest()
        (self.folder / "index.npz").write_bytes(index.getvalue())
        (self.folder / "index.json").write_text(json.dumps(about, indent=1))
        return about

    def _finish(self) -> None:
        self.archive.close()
        path = Path(self.archive.name)
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())  # before an index says that it is there
        self.shards.append({"name": path.name, "bytes": path.stat().st_size, "sha256": digest})
        self.archive = None


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Makes a folder where there is none; what is made, and empty in the end, is taken away again."""
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        with suppress(FileExistsError):  # a file: what is put into it says so
            path.mkdir(parents=True, exist_ok=True)
        yield path
    finally:
        with suppress(OSError):  # something is in it
            for folder in made:
                folder.rmdir()


@contextmanager
def written_aside(target: Path) -> Iterator[Path]:
    """A hidden folder beside `target`, which is renamed to it when all is written, and deleted after an error.

    Raises DataError where `target` is there, or the hidden folder, and for a disk that is full.
    """
    aside = target.with_name(f".{target.name}.unfinished")
    if target.exists():
        raise DataError(f"{target} exists: delete it, or choose another folder")
    try:
        with new_folder(aside.parent):
            aside.mkdir()
            try:
                yield aside
                aside.rename(target)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
    except FileExistsError as error:
        raise DataError(f"{aside} exists: wait for who writes it, or delete what is left of it") from error
    except OSError as error:
        found = f"{target} could not be written ({reason(error)}), nothing was kept"
        raise DataError(f"{found}: look at its room and permissions") from error
