"""Preparing images for training: every one is decoded once, then written into shards.

Checking is the slow part (decoding), so a pool of processes does it; what is written stays in one order, and
packing the same images twice gives the same bytes.
"""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Literal

import PIL
from tqdm import tqdm

from cpvt.data.datasets import Shards, check_resolution, stored_side_needed
from cpvt.data.examine import Shrink, between, examine_all, known
from cpvt.data.shards import ShardWriter, written_aside
from cpvt.data.sources import Entry, Layout, Listing, Refused, find_layout
from cpvt.errors import DataError
from cpvt.rng import permutation

IMAGENET = {"train": 1_281_167, "val": 50_000}  # images of ILSVRC2012 (Russakovsky et al. 2015, table 2)
IMAGENET_CLASSES = 1000
WORDNET_ID = re.compile(r"n\d{8}")
ORDER = "pack/order"  # the key of the order of training images; another key, another order
CHUNK = 16  # images a process is given at a time
SHOWN = 20  # refused images that a report names
Expected = Literal["auto", "imagenet", "any"]


@dataclass
class Report:
    """What became of one split."""

    path: Path
    about: dict  # as in index.json
    seconds: float
    enlarged: tuple[int, float] | None = None  # an image size, and the share of images too small for it

    def __str__(self) -> str:
        about, size = self.about, sum(shard["bytes"] for shard in self.about["shards"])
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in about["kinds"].items())
        lines = [
            f"{self.path}: {about['images']:,} images of {len(about['classes']):,} classes, "
            f"{size / 1e6:,.1f} MB in {len(about['shards'])} shards, {self.seconds:.1f} s "
            f"({about['images'] / self.seconds:.0f} images/s)",
            f"  kinds: {kinds}; the smallest side is {about['min_side']} pixels",
        ]
        if about["short_side"]:
            lines.append(
                f"  shrunk to a short side of {about['short_side']}: {about['shrunk']:,} images "
                f"(JPEG, quality {about['quality']}, {about['chroma']})"
            )
        if self.enlarged:
            side, share = self.enlarged
            needed = stored_side_needed(side)
            lines.append(f"  evaluation at {side} needs a short side of {needed}: {share:.1%} are enlarged")
        return "\n".join(lines + _name_refused(about["refused"]))


def pack(
    source: str | Path,
    out: str | Path,
    splits: Iterable[str] = ("val", "train"),
    shrink: Shrink | None = None,
    shard_mb: int = 1000,
    expect: Expected = "auto",
    workers: int = 0,
    image_size: int = 0,
    report: Callable[[str], None] = print,
) -> list[Report]:
    """Packs the splits of `source` into shards below `out`, one split after the other.

    splits      in this order; each is whole in out/<split> or not there at all, whatever happens
    shrink      of training images; validation images stay as they are
    expect      "imagenet": exactly the images and classes of ILSVRC2012, in WordNet order, or DataError and
                nothing kept; "any"; "auto": "imagenet" for its archives, for Kaggle's layout and for any
                1000 classes named by WordNet ids
    workers     processes that decode; 0: one for each core, 1: none but this one
    image_size  also report the share of images too small for evaluation at this size; 0: no

    What cannot be decoded is left out, named and counted. A class without an image is an error always: a model
    would have an output that nothing teaches and nothing tests.
    """
    source, out, splits, shrink = Path(source), Path(out), list(splits), shrink or Shrink()
    known("expect", expect, Expected)
    between("shard_mb", shard_mb, 1)
    between("workers", workers, 0)
    between("image_size", image_size, 0)
    layout = find_layout(source)
    report(f"{source}: {layout.name}")
    for split in splits:
        if (out / split).exists():
            raise DataError(f"{out / split} exists: delete it, or choose another folder")
    try:
        listings = {split: layout.read(source, split) for split in splits}
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}"
        raise DataError(
            f"{source} cannot be read ({reason}): look at its permissions and its disk"
        ) from error
    if len({listing.classes for listing in listings.values()}) > 1:
        raise DataError(
            f"{source}: {' and '.join(splits)} differ in their classes, expected the same in both"
        )
    whole = {split: _is_imagenet(expect, layout, listings[split]) for split in splits}
    for split in splits:  # before hours of decoding
        entries, _ = _distinct(listings[split])
        _check(f"{source}, {split}", split, listings[split].classes, [e.label for e in entries], whole[split])
    done = []
    for split in splits:
        about = {
            "name": "imagenet" if whole[split] else source.resolve().name,
            "split": split,
            "source": layout.name,
        }
        own = shrink if split == "train" else Shrink()
        started = time.perf_counter()
        with written_aside(out / split) as folder:
            about = _write(folder, listings[split], about, own, shard_mb * 10**6, workers)
            labels = Shards(folder).labels.tolist()
            try:
                _check(f"{source}, {split}", split, listings[split].classes, labels, whole[split])
            except DataError:
                report("\n".join(_name_refused(about["refused"])))
                raise
        done.append(Report(out / split, about, time.perf_counter() - started))
        if image_size:
            shards = Shards(out / split)
            done[-1].enlarged = image_size, check_resolution(shards, image_size, allow=True)
        report(str(done[-1]))
    return done


def _write(
    folder: Path, listing: Listing, about: dict, shrink: Shrink, shard_bytes: int, workers: int
) -> dict:
    entries, repeated = _distinct(listing)
    refused, kinds, shrunk = [*listing.refused, *repeated], Counter(), 0
    if about["split"] == "train":  # so that images read one after the other are of different classes
        entries = [entries[i] for i in permutation(ORDER, len(entries)).tolist()]
    writer = ShardWriter(folder, shard_bytes)
    chunks = [entries[i : i + CHUNK] for i in range(0, len(entries), CHUNK)]
    results = in_order(partial(examine_all, shrink=shrink), chunks, workers or len(os.sched_getaffinity(0)))
    with tqdm(total=len(entries), desc=about["split"], unit="img", disable=None) as progress:
        for chunk, found in zip(chunks, results, strict=True):
            for entry, picture in zip(chunk, found, strict=True):
                if isinstance(picture, str):
                    refused.append(Refused(entry.name, picture))
                    progress.set_postfix(refused=len(refused))
                    continue
                kinds[picture.kind] += 1
                shrunk += picture.shrunk
                writer.add(
                    entry.key, picture.ending, picture.data, entry.label, picture.height, picture.width
                )
            progress.update(len(chunk))
    if shrink.short_side:
        how = {"quality": shrink.quality, "chroma": shrink.chroma, "encoder": f"Pillow {PIL.__version__}"}
    else:
        how = {"quality": None, "chroma": None, "encoder": None}
    return writer.close(
        **about,
        classes=listing.classes,
        short_side=shrink.short_side,
        **how,
        shrunk=shrunk,
        kinds=dict(kinds.most_common()),
        refused=[(_plain(name), _plain(reason)) for name, reason in refused],
    )


def _distinct(listing: Listing) -> tuple[list[Entry], list[Refused]]:
    """The entries with each name once in a class, the first one; and those that come again."""
    seen, first, again = set(), [], []
    for entry in listing.entries:
        if entry.key in seen:
            again.append(Refused(entry.name, "its class has an image of this name already"))
        else:
            seen.add(entry.key)
            first.append(entry)
    return first, again


def _is_imagenet(expect: str, layout: Layout, listing: Listing) -> bool:
    named = all(WORDNET_ID.fullmatch(wnid) for wnid in listing.classes)
    looks = layout.imagenet or (len(listing.classes) == IMAGENET_CLASSES and named)
    return expect == "imagenet" or (expect == "auto" and looks)


def _check(where: str, split: str, classes: tuple[str, ...], labels: list[int], imagenet: bool) -> None:
    if imagenet and (len(classes), len(labels)) != (IMAGENET_CLASSES, IMAGENET[split]):
        raise DataError(
            f"{where}: {len(labels):,} images of {len(classes):,} classes, expected ImageNet's "
            f"{IMAGENET[split]:,} of {IMAGENET_CLASSES:,}: complete it, or pass --expect any; nothing was kept"
        )
    if list(classes) != sorted(set(classes)):
        raise DataError(
            f"{where}: the classes are not in the order of their names, expected each once, sorted"
        )
    empty = sorted(set(range(len(classes))) - set(labels))
    if empty:
        raise DataError(
            f"{where}: {len(empty)} of {len(classes)} classes have no image (the first: {classes[empty[0]]}): "
            f"fill them, or delete them in every split; nothing was kept"
        )


def _name_refused(refused: list) -> list[str]:
    if not refused:
        return []
    lines = [f"  refused {len(refused):,}:"] + [f"    {name}: {reason}" for name, reason in refused[:SHOWN]]
    more = len(refused) - SHOWN
    return lines + ([f"    and {more:,} more, all in index.json"] if more > 0 else [])


def _plain(text: str) -> str:
    """Names come from archives: line breaks and half characters are spelled out."""
    return text if text.isprintable() else ascii(text)


# Many images


def in_order(work: Callable, chunks: list, workers: int) -> Iterator:
    """work(chunk) for every chunk, in their order, by several processes; little is held at a time."""
    if workers == 1:
        yield from map(work, chunks)
        return
    # A fork starts at once, and a child uses Pillow alone, none of the threads that a fork leaves behind.
    pool = ProcessPoolExecutor(workers, mp_context=get_context("fork"), initializer=_follow_parent)
    waiting = deque()
    try:
        for chunk in chunks:
            waiting.append(pool.submit(work, chunk))
            if len(waiting) > 3 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            f"one of {workers} processes was killed, most likely for want of memory: use fewer --workers"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _follow_parent() -> None:
    """Ctrl-C is for the parent, which tells its children; and a child does not outlive a killed parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch():
        connection.wait([parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
