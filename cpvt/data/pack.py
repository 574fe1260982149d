"""ImageNet as people have it -> shards. Every image is decoded once, and what cannot be decoded is named.

Folders of classes are known, and the archives of ILSVRC2012 as published. torchvision unpacks the archives, which
need their own size once more on the disk for that while.
"""

import hashlib
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import quote

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from cpvt.config import local_path
from cpvt.data.datasets import ImageDataset, in_words, open_dataset, refuse_among_images
from cpvt.data.decode import decode_image, open_image, reason
from cpvt.data.loader import work
from cpvt.data.shards import KEY_BYTES, Shards, ShardWriter, new_folder, written_aside
from cpvt.errors import DataError, typed
from cpvt.rng import permutation

IMAGENET = {"train": 1_281_167, "val": 50_000}  # images of ILSVRC2012 (Russakovsky et al. 2015, table 2)
IMAGENET_CLASSES = 1000
ARCHIVES = {"train": "ILSVRC2012_img_train.tar", "val": "ILSVRC2012_img_val.tar"}
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
KAGGLE = "LOC_val_solution.csv"
ORDER = "pack/order"  # the key of the order of training images; another key, another order
ENDINGS = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif"}  # of Pillow's formats; of others it is their name
SHOWN = 20  # refused images that a report names


@typed
def pack(
    source: str | Path,
    out: str | Path,
    splits: Iterable[str] = ("val", "train"),
    *,
    partial: bool = False,
    workers: int = 0,
    report: Callable[[str], None] = print,
) -> None:
    """Packs the splits of `source` into shards below `out`, one split after the other.

    splits      in this order; each is whole in out/<split> or not there at all, whatever happens
    partial     accept a part of ImageNet; else a thousand classes named by WordNet ids must have all its images
    workers     processes that decode; 0: one for each core, 1: none but this one

    What cannot be decoded is left out, named and counted. A class without an image is an error always: a model
    would have an output that nothing teaches and nothing tests.
    """
    source, out, splits = Path(local_path(source)), Path(local_path(out)), [*dict.fromkeys(splits)]
    if not splits:
        raise DataError("no split to pack: give val, train or both")
    if not 0 <= workers <= 512:
        raise DataError(f"workers={workers}; expected 0 to 512")
    refuse_among_images(out, source)
    for split in splits:
        if (out / split).exists():
            raise DataError(f"{out / split} exists: delete it, or choose another folder")
    with _open_source(source, splits, out.parent) as (root, found):
        classes = found[splits[0]].classes
        for split in splits:  # before hours of decoding
            if found[split].classes != classes:
                raise DataError(f"{source}, {split}: other classes than in {splits[0]}; give both the same")
            _check_whole(split, classes, found[split].labels, partial)
        for split in splits:
            started = time.perf_counter()
            with written_aside(out / split) as folder:
                about = _write(ShardWriter(folder), found[split], root, workers)
                report(_report(out / split, about, time.perf_counter() - started))
                _check_whole(split, classes, Shards(folder).labels, partial)


def _check_whole(split: str, classes: tuple[str, ...], labels: Tensor, partial: bool) -> None:
    """Raises DataError unless each class has an image, and ImageNet all that it should have."""
    found = f"{split}: {len(labels):,} images of {len(classes):,} classes"
    imagenet = len(classes) == IMAGENET_CLASSES and all(re.fullmatch(r"n\d{8}", wnid) for wnid in classes)
    if imagenet and not partial and len(labels) != IMAGENET[split]:
        raise DataError(f"{found}, and ImageNet has {IMAGENET[split]:,}: complete it, or pass --partial")
    empty = (labels.bincount(minlength=len(classes)) == 0).nonzero().flatten().tolist()
    if empty:
        first = f"{len(empty)} have no image (the first: {classes[empty[0]]})"
        raise DataError(f"{found}; {first}: fill them, or delete them in every split")


def _report(path: Path, about: dict, seconds: float) -> str:
    images, classes, refused = about["images"], len(about["classes"]), about["refused"]
    shards, kinds = len(about["shards"]), about["kinds"]
    head = f"{path}: {images:,} images of {classes:,} classes in {shards} shards, {seconds:.1f} s"
    others = in_words(Counter(about["others"])) or "none"
    counts = f"  kinds {kinds}; passed over by their names: {others}; refused {len(refused):,}"
    return "\n".join([head, counts, *(f"    {ascii(name)}: {why}" for name, why in refused[:SHOWN])])


def _write(writer: ShardWriter, data: ImageDataset, root: Path, workers: int) -> dict:
    order = range(len(data))
    if data.split == "train":  # so that images read one after the other are of different classes
        order = permutation(ORDER, len(data)).tolist()
    workers = workers or len(os.sched_getaffinity(0))
    examined = work(_Examiner(data), order, workers if workers > 1 else 0)
    names = [data.path(i).relative_to(root) for i in range(len(data))]
    keys, kinds, refused = _keys(data, names), Counter(), []
    shown = tqdm(examined, data.split, len(order), unit="img", disable=None)
    with closing(examined):
        for i, found in zip(order, shown, strict=True):
            if isinstance(found, str):
                refused.append((str(names[i]), found))
                continue
            content, kind, ending = found
            writer.add(keys[i], ending, content.numpy().tobytes(), int(data.labels[i]))
            kinds[kind] += 1
    about = {"split": data.split, "classes": data.classes, "kinds": dict(kinds.most_common())}
    return writer.close(**about, refused=refused, others=data.others)


class _Examiner(Dataset):
    """Image i -> (its bytes, kind, ending), or why it is refused.

    The bytes are a tensor, in shared memory: a full pipe would keep a process alive whose parent was killed.
    """

    def __init__(self, data: ImageDataset):
        self.data = data

    def __getitem__(self, i: int) -> tuple[Tensor, str, str] | str:
        try:
            content = self.data.read(i)
            decode_image(content)
            with open_image(content) as image:
                kind, ending = f"{image.format} {image.mode}", ENDINGS.get(image.format, image.format.lower())
        except (OSError, DataError, MemoryError) as error:
            return reason(error)
        return torch.frombuffer(bytearray(content), dtype=torch.uint8), kind, ending


def _keys(data: ImageDataset, names: list[Path]) -> list[str]:
    """CLASS/NAME of each image, as a tar entry may be called: ASCII, at most 90 bytes, each once, and without a
    dot, where WebDataset cuts."""
    keys, seen = [], set()
    for i, (name, label) in enumerate(zip(names, data.labels.tolist(), strict=True)):
        wnid, (_, *inner) = data.classes[label], name.with_suffix("").parts  # without the split
        # Below its class an image may lie deeper, as train/CLASS/images/ of Tiny-ImageNet; or beside it.
        inner = inner[1:] if inner[0] == wnid else inner[-1:]
        key = quote(os.fsencode("/".join((wnid, *inner))), safe="/").replace(".", "%2E")
        key += f"-{i}" if key in seen else ""  # two files that differ in their endings alone
        seen.add(key)
        if len(key) > KEY_BYTES:
            key = f"{key[: KEY_BYTES - 17]}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        keys.append(key)
    return keys


@contextmanager
def _open_source(source: Path, splits: list[str], scratch: Path) -> Iterator[tuple[Path, dict]]:
    """The folder that holds the splits, and what is to be packed of each."""
    if not source.is_dir():
        raise DataError(f"no folder {source}: give one with train/ and val/, or with {DEVKIT}")
    if (source / KAGGLE).is_file():
        words = f"move each image of val/ into a folder named by its class in {KAGGLE}"
        raise DataError(f"{source} is Kaggle's layout: {words}, and pack the folder above train/ and val/")
    if any((source / name).exists() for name in (DEVKIT, *ARCHIVES.values())):
        with new_folder(scratch), tempfile.TemporaryDirectory(prefix=".unpacked-", dir=scratch) as folder:
            _unpack(source, splits, Path(folder))
            yield Path(folder), {s: open_dataset(folder, s) for s in splits}
    else:
        found = {split: open_dataset(source, split) for split in splits}
        if any(isinstance(data, Shards) for data in found.values()):
            raise DataError(f"{source} is packed already: give the folder of the originals")
        yield source, found


def _unpack(source: Path, splits: list[str], folder: Path) -> None:
    """ILSVRC2012's archives -> folder/<split>/<class>/*.JPEG, by torchvision, which compares their MD5 first.

    No other tar is ever opened.
    """
    from torchvision.datasets import ImageNet

    for name in (DEVKIT, *ARCHIVES.values()):
        if (source / name).exists():
            (folder / name).symlink_to((source / name).resolve())
    try:
        for split in splits:
            ImageNet(folder, split)
    except (RuntimeError, OSError) as error:
        raise DataError(f"{source} cannot be unpacked ({reason(error)}): complete the archives") from error
