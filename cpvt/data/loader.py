"""Batches as a function of the step: the same seed and step give the same batch, whatever came before.

Letters: B images of a micro-batch, S side of an image in pixels.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from cpvt.config import AugmentConfig, DataConfig
from cpvt.data.datasets import ImageDataset, load_tensors, open_dataset
from cpvt.data.decode import Fault
from cpvt.data.reading import Filed, Held, refuse_ruins
from cpvt.data.resize import centre_box, crop_resize
from cpvt.data.sampler import Share, Stream
from cpvt.data.shards import check_resolution
from cpvt.data.synthetic import CLASSES, draw
from cpvt.data.transforms import MEAN, STD, Recipe, normalise
from cpvt.errors import ConfigError, DataError

__all__ = ["MEAN", "STD", "Batch", "Diagnostics", "Images", "Share", "normalise", "open_batches"]

_kept: dict[tuple, Held] | None = None  # images that `keep_images` keeps
AHEAD = 3  # micro-batches that are ready before the model asks for them


@dataclass
class Batch:
    """A micro-batch: normalised images (B, 3, S, S), and labels (B,) or mixed labels (B, classes).

    epoch, positions  which samples these are: (B,) int64 on the CPU
    faults            images that could not be used, and what stands in for them
    refused           images that the GPU refused to decode and the CPU decoded
    """

    images: Tensor
    targets: Tensor
    epoch: int
    positions: Tensor
    faults: list[Fault] = field(default_factory=list)
    refused: int = 0


class _Batches:
    """What diagnostics and images have in common: the stream, and the part of it that this process handles."""

    stream: Stream
    num_classes: int
    image_size: tuple[int, int]
    fingerprint: str

    def __init__(self, data: DataConfig, seed: int, device: str, share: Share):
        self.data, self.seed, self.device, self.share = data, seed, device, share
        self.unread: dict[str, Fault] = {}  # held-out images that could not be used

    @property
    def parts(self) -> int:
        """Micro-batches that this process handles in a step."""
        return len(self.share.parts(self.stream.batch, self.stream.group))

    def upsampled(self, allow: bool = False) -> float:
        """The share of held-out images, 0 to 1, that are smaller than evaluation needs and are enlarged.

        Raises DataError for shards that were shrunk below it, unless allowed.
        """
        return 0.0

    def micro_batches(self, start: int = 0) -> Iterator[Batch]:
        """This process's micro-batches from step `start` on, `parts` of them a step, without end."""
        raise NotImplementedError

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """This process's images and targets of one step, in one piece."""
        with contextlib.closing(self.micro_batches(step)) as batches:
            parts = list(islice(batches, self.parts))
        return torch.cat([part.images for part in parts]), torch.cat([part.targets for part in parts])

    def _places(self, start: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Epoch, positions and group numbers of every micro-batch from a step on."""
        group, step = self.stream.group, start
        parts = self.share.parts(self.stream.batch, group)
        while True:
            epoch, positions = self.stream.places(step)
            groups = self.stream.group_numbers(step)
            for part in parts:
                yield epoch, positions[part], groups[part.start // group : part.stop // group]
            step += 1


class Diagnostics(_Batches):
    """Batches of a synthetic diagnostic, drawn as they are needed. (B, 3, H*pixels, W*pixels), (B,)."""

    fingerprint = "drawn"  # by formula: the configuration says all

    def __init__(self, data: DataConfig, batch: int, seed: int, device: str = "cpu", share: Share = Share()):
        super().__init__(data, seed, device, share)
        self.stream = Stream(data.train_size, batch, seed)
        self.num_classes = len(CLASSES[data.name])
        self.image_size = data.grid[0] * data.pixels, data.grid[1] * data.pixels

    def draw(self, index: Tensor, split: str, **options):
        options = {"grid": self.data.grid, "pixels": self.data.pixels, "seed": self.seed, **options}
        return draw(self.data.name, index.to(self.device), split=split, **options)

    def micro_batches(self, start: int = 0) -> Iterator[Batch]:
        # Their order is drawn by formula too, so the stream's places are the samples.
        size, part, step = self.stream.batch, self.share.parts(self.stream.batch), start
        while True:
            places = (torch.arange(size) + step * size) % self.data.train_size
            for piece in part:
                sample = self.draw(places[piece], "train")
                yield Batch(
                    normalise(sample.images), sample.labels, self.stream.position(step)[0], places[piece]
                )
            step += 1

    def test(self, split: str = "val") -> Iterator[tuple[Tensor, Tensor]]:
        for index in _every(self.share, self.data.test_size):
            sample = self.draw(index, split)
            yield normalise(sample.images), sample.labels


class Images(_Batches):
    """Batches of real images: from memory, or read, decoded and augmented a few micro-batches ahead."""

    def __init__(
        self,
        data: DataConfig,
        batch: int,
        seed: int,
        device: str = "cpu",
        share: Share = Share(),
        augment: AugmentConfig = AugmentConfig(),
        smoothing: float = 0.0,
        train: bool = True,
        decode_jpegs=None,
    ):
        """`train`: whether there is anything to train on; without it only `test` gives batches."""
        super().__init__(data, seed, device, share)
        self.decode_jpegs = decode_jpegs
        self.held_out = self._source("val")
        self.num_classes = len(self.held_out.classes)
        self.image_size = data.image_size, data.image_size
        if not train:
            return
        self.train = self._source("train")
        if self.train.classes != self.held_out.classes:
            raise DataError(
                f"{data.name}: {len(self.train.classes)} classes to train on, {len(self.held_out.classes)} "
                "held out, or other ones: labels would mean different things; give both splits the same classes"
            )
        self.fingerprint = self.train.fingerprint
        self.recipe = Recipe(augment, data.image_size, self.num_classes, smoothing, seed)
        group = augment.mix_group if augment.mixup or augment.cutmix else 1
        order = seed
        self.stream = Stream(len(self.train), batch, order, group, augment.repeated_aug)
        share.parts(batch, group)  # refused before anything starts, where it cannot be cut

    @property
    def _side(self) -> int:
        return self.data.stored_size or self.data.image_size

    def _source(self, split: str) -> Held | Filed:
        dataset = self._open(split)
        if self.data.store == "memory":
            if _kept is None:
                return Held(load_tensors(dataset, self._side), self.device)
            data, side = self.data, self._side
            device = torch.device(self.device)  # "cuda" and "cuda:0" are the same
            key = data.name, data.root, split, data.hold_out, data.limit, side, device.type, device.index or 0
            if key not in _kept:
                _kept[key] = Held(load_tensors(dataset, side), self.device)
            return _kept[key]
        return Filed(dataset, self.data, self.device, self.decode_jpegs)

    def _open(self, split: str) -> ImageDataset:
        every, limit = self.data.hold_out, self.data.limit
        dataset = open_dataset(self.data.name, "train" if every else split, root=self.data.root)
        if every:
            held_out = torch.arange(len(dataset)) % every == 0
            dataset = dataset.select((held_out if split == "val" else ~held_out).nonzero().flatten())
        if 0 < limit < len(dataset):  # spread over the classes, which stand one after the other
            dataset = dataset.select(torch.linspace(0, len(dataset) - 1, limit).long())
        return dataset

    def micro_batches(self, start: int = 0) -> Iterator[Batch]:
        places, waiting = self._places(start), deque()

        def indices() -> Iterator[Tensor]:
            for place in places:
                waiting.append(place)
                yield self.stream.indices(*place[:2])

        # All reading processes start here, before a thread runs: what a thread holds is lost to a fork.
        self.held_out.start()
        decoded = self.train.read(indices())

        def finished() -> Iterator[Batch]:
            for images in decoded:
                epoch, positions, groups = waiting.popleft()
                refuse_ruins(images.faults, len(positions))
                pixels, targets = self.recipe(images.images, images.labels, epoch, positions, groups)
                yield Batch(pixels, targets, epoch, positions, images.faults, images.refused)

        return _ahead(finished(), self.device) if "cuda" in self.device else finished()

    def upsampled(self, allow: bool = False) -> float:
        if self.data.store == "memory":
            return 0.0
        return check_resolution(self.held_out.source, self.data.image_size, allow, self.data.crop_pct)

    def test(self, split: str = "val") -> Iterator[tuple[Tensor, Tensor]]:
        size = self.data.image_size
        lists = _every(self.share, len(self.held_out))
        for index, found in zip(lists, self.held_out.read(lists), strict=True):
            images, same, labels = found.images, isinstance(found.images, Tensor), found.labels
            # What cannot be read counts as wrong, whatever stands in for it: no guess is -1.
            spoiled = {fault.index: fault for fault in found.faults}
            self.unread |= {fault.key: fault for fault in spoiled.values()}
            labels[[i for i, sample in enumerate(index.tolist()) if sample in spoiled]] = -1
            if not (same and images.shape[-2:] == (size, size) and self.data.crop_pct == 1):
                boxes = [centre_box(*image.shape[1:], size, self.data.crop_pct) for image in images]
                boxes = torch.tensor(boxes, dtype=torch.float64)
                images = crop_resize(images, boxes, (size, size), bound="image")
            yield normalise(images.float() / 255), labels


@contextlib.contextmanager
def keep_images() -> Iterator[None]:
    """Within, images that are held in memory are decoded once, however many batches are opened on them; for runs
    one after the other, while the files stay as they are."""
    global _kept
    before, _kept = _kept, {} if _kept is None else _kept
    try:
        yield
    finally:
        _kept = before


def _every(share: Share, count: int) -> tuple[Tensor, ...]:
    """This process's part of `count` samples, in lists; none where there are fewer samples than processes."""
    own = torch.arange(count)[share.rank :: share.world]
    return own.split(256) if len(own) else ()


def _ahead(batches: Iterator[Batch], device: str) -> Iterator[Batch]:
    """The same batches, made by a thread on a stream of its own, `AHEAD` of them at most."""
    ready, stop = queue.Queue(AHEAD), threading.Event()
    stream = torch.cuda.Stream(device)

    def put(item) -> bool:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=0.1)
                return True
        return False

    def work() -> None:
        try:
            with torch.cuda.stream(stream):
                for batch in batches:
                    done = torch.cuda.Event()
                    done.record(stream)
                    if not put((batch, done)):
                        return
            put(None)
        except BaseException as error:  # raised again where the batch is asked for
            put(error)

    thread = threading.Thread(target=work, daemon=True, name="batches")
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            batch, done = item
            own = torch.cuda.current_stream(device)
            own.wait_event(done)
            for tensor in (batch.images, batch.targets):
                tensor.record_stream(own)  # its memory is not given to the next batch before this one is used
            yield batch
    finally:
        stop.set()
        thread.join()


def open_batches(
    data: DataConfig, batch: int, seed: int, device: str = "cpu", share: Share = Share(), **images
) -> Diagnostics | Images:
    """The batches that `data` names: a diagnostic, a known set of images, or a folder of files or shards.

    `images`: `augment` and `smoothing` of `Images`; a diagnostic is never augmented.
    """
    if data.name in CLASSES:
        augment = images.get("augment", AugmentConfig())
        if augment != AugmentConfig(mix_group=augment.mix_group):
            raise ConfigError(f"data.name={data.name!r} is drawn, and never augmented: leave augment.* alone")
        return Diagnostics(data, batch, seed, device, share)
    return Images(data, batch, seed, device, share, **images)
