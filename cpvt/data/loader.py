"""Batches as a function of the step: the same seed and step give the same batch, whatever came before.

images in memory   sampler -> request -> pixels -> transform -> batch
files, on a CPU    sampler -> request -> worker process: bytes -> pixels -> transform -> batch
files, on a GPU    sampler -> request -> worker processes: bytes -> thread: pixels -> transform -> batch
"""

import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import count, islice
from multiprocessing import forkserver, resource_tracker
from unicodedata import normalize

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cpvt.config import AugmentConfig, DataConfig, refuse_idle
from cpvt.data.datasets import NAMED, ImageDataset, ImageTensors, in_words, load_tensors, open_dataset
from cpvt.data.decode import Batch, Decoder, Fault, ReadBatch
from cpvt.data.sampler import Request, Sampler
from cpvt.data.shards import Shards
from cpvt.data.synthetic import CLASSES, draw
from cpvt.data.transforms import TrainTransform, area_resize, centre_resize, normalise, send
from cpvt.errors import ConfigError, DataError, typed

FOR_DRAWN = "grid", "pixels", "train_size", "test_size"  # options of synthetic tasks alone
FOR_IMAGES = tuple(f.name for f in fields(DataConfig) if f.name not in ("name", *FOR_DRAWN))
AHEAD = 3  # micro-batches that are made before the model on a GPU asks for them
EVAL_BATCH = 256  # images
UNUSABLE = 256  # images more than good ones, or as many as there are, end a run


# --------------------------------------------------------------------------- worker processes


def work(reader: Dataset, requests: Iterable, workers: int, finish: Callable | None = None) -> Iterator:
    """`finish(reader[request])` for each request, in order, by so many processes (0: by this one)."""
    options = {"sampler": requests, "num_workers": workers, "collate_fn": finish}
    if workers:
        # One request ahead a worker: the bytes of 1,024 photographs are 0.1 GB of shared memory.
        options |= {"prefetch_factor": 1, "worker_init_fn": _stand_apart}
        options["multiprocessing_context"] = "forkserver"
    try:
        loader = DataLoader(reader, batch_size=None, **options)
        yield from _started(loader) if workers else loader
        return
    except Exception as error:
        if workers:  # which live as long as the frames of DataLoader
            traceback.clear_frames(error.__traceback__)
        if not isinstance(error, EOFError | ConnectionError) and "DataLoader worker (pid" not in str(error):
            raise
    words = 'give it more memory, let fewer work, or in a script guard its start by __name__ == "__main__"'
    raise DataError(f"a DataLoader worker was killed: {words}")


# SLURM announces the end of a job with SIGUSR1, a terminal its own with SIGHUP.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
_servers: dict[int, forkserver.ForkServer] = {}  # by the process that has it: a fork needs its own


def _server() -> forkserver.ForkServer:
    """Starts the process that workers are forked from; it has imported this module, which takes 2 s once.

    A fork of the main process would copy locks that threads of NCCL, CUDA or the compiler hold. Signals to the
    group (a terminal, torchrun) or to all processes (SLURM) are the main process's to answer, and it still needs
    its workers: these are born with such signals blocked, and by a server of their own.
    """
    server = _servers.setdefault(os.getpid(), forkserver.ForkServer())
    server.set_forkserver_preload([__name__])
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        resource_tracker.ensure_running()  # which leaves two of them unblocked
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        server.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return server


def _started(loader: DataLoader) -> Iterator:
    """Its batches, by workers of our own server."""
    usual, before = forkserver.connect_to_new_process, {*multiprocessing.active_children()}
    forkserver.connect_to_new_process = _server().connect_to_new_process
    try:
        return iter(loader)
    except BaseException:
        # Those that stand already would miss the signal that is to end them, and be waited for.
        for worker in {*multiprocessing.active_children()} - before:
            worker.kill()
        raise
    finally:
        forkserver.connect_to_new_process = usual


def _stand_apart(worker: int) -> None:
    """In a worker: leaves the run's process group; ends with the main process, which is not its parent."""

    def end() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    os.setpgrp()
    for handler in (signal.SIG_IGN, signal.SIG_DFL):  # the first forgets what came before
        signal.signal(signal.SIGTERM, handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # with which DataLoader ends it
    threading.Thread(target=end, daemon=True).start()


def make_ahead(batches: Iterator[Batch], stream: torch.cuda.Stream | None = None) -> Iterator[Batch]:
    """The same batches, made by a thread, AHEAD of them; what it does on a GPU it does on `stream`."""

    def make() -> tuple[Batch | None, torch.cuda.Event | None]:
        with torch.cuda.stream(stream) if stream else nullcontext():
            return next(batches, None), stream and stream.record_event()

    thread = ThreadPoolExecutor(1, "batches")
    try:
        coming = deque(thread.submit(make) for _ in range(AHEAD))
        while (made := coming.popleft().result())[0]:
            coming.append(thread.submit(make))
            batch, done = made
            if stream:
                model = torch.cuda.current_stream(stream.device)
                model.wait_event(done)
                for tensor in (batch.images, batch.targets):
                    tensor.record_stream(model)  # its memory is not given to the next batch before it is used
            yield batch
    finally:
        thread.shutdown(cancel_futures=True)
        batches.close()


# --------------------------------------------------------------------------- loaders

Images = ImageDataset | Shards | ImageTensors  # in files, or in memory on the device


class Loader:
    """What both kinds share. They also tell the names of the classes, image_size (height, width), the fingerprint
    of what is trained on, and the held-out images that were `unread`, by name."""

    passed_over = ""  # files whose names are not an image's, for people

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def micro_batches_per_step(self) -> int:
        return len(self.sampler.micro_batches)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """This process's images and targets of one step, in one piece."""
        with closing(self.train_batches(step)) as batches:
            parts = list(islice(batches, self.micro_batches_per_step))
        return torch.cat([part.images for part in parts]), torch.cat([part.targets for part in parts])


class SyntheticLoader(Loader):
    """Batches of a synthetic task, drawn as they are needed. (B, 3, H*pixels, W*pixels), (B,)."""

    fingerprint = "drawn"  # by formula: the configuration says all

    def __init__(self, data: DataConfig, sampler: Sampler, device: str):
        self.data, self.sampler, self.device, self.unread = data, sampler, device, {}
        self.classes, (H, W) = CLASSES[data.name], data.grid
        self.image_size = H * data.pixels, W * data.pixels

    def draw(self, index: Tensor, split: str) -> tuple[Tensor, Tensor]:
        options = {"grid": self.data.grid, "pixels": self.data.pixels, "seed": self.sampler.seed}
        drawn = draw(self.data.name, send(index, torch.device(self.device)), split=split, **options)
        return normalise(drawn.images), drawn.labels

    def train_batches(self, start_step: int = 0) -> Iterator[Batch]:
        for step in count(start_step):
            epoch, first = step // self.sampler.steps_per_epoch, step * self.sampler.global_batch_size
            for part in self.sampler.micro_batches:
                # Their order is drawn by formula too, so positions are indices.
                positions = torch.arange(first + part.start, first + part.stop) % self.data.train_size
                request = Request(epoch, positions, positions, positions)
                yield Batch(request, *self.draw(positions, "train"))

    def eval_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index in _own_part(self.data.test_size, self.sampler.rank, self.sampler.world_size):
            yield self.draw(index, "val")


@dataclass
class ImageLoader(Loader):
    """Batches of real images; without training set, sampler and transform, of held-out ones alone."""

    data: DataConfig
    device: torch.device
    rank: int
    world_size: int
    val_set: Images
    train_set: Images | None = None
    sampler: Sampler | None = None
    transform: TrainTransform | None = None

    def __post_init__(self):
        self.classes, self.image_size = tuple(self.val_set.classes), self.data.shape
        self.unread: dict[str, Fault] = {}
        if self.workers and not isinstance(self.val_set, ImageTensors):
            _server()  # by the time that it is needed it is there

    @property
    def fingerprint(self) -> str:
        return self.train_set.fingerprint

    @property
    def passed_over(self) -> str:
        splits = ("train", self.train_set), ("val", None if self.data.hold_out else self.val_set)
        return "; ".join(f"{name}: {in_words(s.others)}" for name, s in splits if s is not None and s.others)

    @property
    def workers(self) -> int:
        """Processes that read: as configured, or one for each core that this process of the run may use."""
        beside = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        own = max(1, min(len(os.sched_getaffinity(0)) // beside, 16))
        return own if self.data.workers < 0 else self.data.workers

    def train_batches(self, start_step: int = 0) -> Iterator[Batch]:
        """This process's micro-batches from a step on, without end. Closing it ends its worker processes."""
        requests, finish = self.sampler.requests(start_step), partial(_augmented, self.transform)
        # Some are grey and named. Where most are it is the disk. Counted on, and not in each micro-batch: where a
        # share p below a half is unusable, the excess gets so far by chance once in (1/p - 1)^256 tries.
        excess, limit = 0, min(UNUSABLE, len(self.train_set.labels))
        with closing(self._batches(self.train_set, requests, finish, self.workers)) as batches:
            for batch in batches:
                excess = max(0, excess + 2 * len(batch.faults) - len(batch.images))
                if excess >= limit:
                    last = f"{batch.faults[-1].key}, {batch.faults[-1].reason}"
                    raise DataError(f"most of the images cannot be used (as {last}): see to files and disk")
                yield batch

    def eval_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's part of the held-out images, and their labels: -1 for one that cannot be read."""
        parts = _own_part(len(self.val_set.labels), self.rank, self.world_size)
        requests = [Request(0, index, index, index) for index in parts]
        finish = partial(_centred, self.data, self.device)
        workers = min(self.workers, len(requests))
        with closing(self._batches(self.val_set, requests, finish, workers)) as batches:
            for batch in batches:
                self.unread |= {fault.key: fault for fault in batch.faults}
                yield batch.images, batch.targets

    def _batches(self, images: Images, requests: Iterable[Request], finish, workers: int) -> Iterator[Batch]:
        """`finish`: decoded images -> Batch."""
        if not (cuda := self.device.type == "cuda"):
            finish = partial(_in_one_thread, finish)
        if isinstance(images, ImageTensors):
            asked = ((request, send(request.indices, images.images.device)) for request in requests)
            batches = (finish(Batch(r, images.images[index], images.labels[index])) for r, index in asked)
        else:
            decoder = Decoder(images, self.device, self.data.decode)
            if not cuda:
                return work(decoder.reader, requests, workers, partial(_finished, decoder, finish))
            batches = (finish(decoder(read)) for read in work(decoder.reader, requests, workers))
        return make_ahead(batches, torch.cuda.Stream(self.device)) if cuda else batches


def _own_part(count: int, rank: int, world_size: int) -> tuple[Tensor, ...]:
    """This process's part of `count` samples, in lists; none where there are fewer samples than processes."""
    own = torch.arange(count)[rank::world_size]
    return own.split(EVAL_BATCH) if len(own) else ()


def _finished(decoder: Decoder, finish: Callable, read: ReadBatch) -> Batch:
    return finish(decoder(read))


def _in_one_thread(work: Callable, *given):
    """Many small operations: threads that wait for each other at each take the cores from whatever else runs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return work(*given)
    finally:
        torch.set_num_threads(threads)


def _augmented(transform: TrainTransform, batch: Batch) -> Batch:
    where = batch.request.epoch, batch.request.positions, batch.request.groups
    images, targets = transform(batch.images, batch.targets, *where)
    return replace(batch, images=images, targets=targets)


def _centred(data: DataConfig, device: torch.device, batch: Batch) -> Batch:
    labels = batch.targets
    # What cannot be read counts as wrong, whatever stands in for it: no guess is -1.
    bad = {fault.index for fault in batch.faults}
    labels[[i for i, index in enumerate(batch.request.indices.tolist()) if index in bad]] = -1
    images = normalise(evaluation_pixels(batch.images, data).float() / 255)
    return replace(batch, images=images, targets=send(labels, device))


def evaluation_pixels(images: Sequence[Tensor] | Tensor, data: DataConfig) -> Tensor:
    """B images (3, h, w) uint8, as held -> (B, 3, H, W) uint8: what a model sees of them in evaluation."""
    if data.interpolation == "area":
        return area_resize(images, torch.tensor((0, 0, *images.shape[2:])), data.shape)
    return centre_resize(images, data.shape, data.crop_pct)


def open_split(data: DataConfig, split: str, device: str = "cpu", cache: dict | None = None) -> Images:
    """One split, or the part of it that is configured. `cache` keeps what is in memory for later runs."""
    held, place = data.held_shape, torch.empty(0, device=device).device
    key = data.name, data.root, split, data.hold_out, data.limit, held, place
    cache = {} if cache is None else cache
    if data.store == "memory" and key in cache:
        return cache[key]
    images = open_dataset(data.name, "train" if data.hold_out else split, root=data.root)
    if data.hold_out:
        held_out = torch.arange(len(images)) % data.hold_out == 0
        images = images.select((held_out if split == "val" else ~held_out).nonzero().flatten())
    if 0 < data.limit < len(images):  # spread over the classes, which stand one after the other
        images = images.select(torch.linspace(0, len(images) - 1, data.limit).long())
    if data.store == "files":
        return images
    tensors = load_tensors(images, held)
    cache[key] = replace(tensors, images=tensors.images.to(device), labels=tensors.labels.to(device))
    return cache[key]


@typed
def make_loader(
    data: DataConfig,
    *,
    seed: int,
    global_batch_size: int = 1,
    device: str = "cpu",
    rank: int = 0,
    world_size: int = 1,
    micro_batch_size: int = 0,
    augment: AugmentConfig = AugmentConfig(),
    label_smoothing: float = 0.0,
    train: bool = True,
    cache: dict | None = None,
    open_split: Callable[..., Images] = open_split,
) -> SyntheticLoader | ImageLoader:
    """The batches that `data` names, shared out as `Sampler` says; without `train`, held-out images alone.

    A script whose images come from worker processes needs the guard `if __name__ == "__main__":`.
    """
    shared, drawn = (rank, world_size, micro_batch_size), data.name in CLASSES
    idle = FOR_IMAGES if drawn else FOR_DRAWN + ("root",) * (data.name not in NAMED)
    kind = "drawn" if drawn else "known by name" if data.name in NAMED else "a folder"
    refuse_idle(data, f"where data.name={data.name!r} is {kind}", *idle)
    if drawn:
        if augment != AugmentConfig(mix_group=augment.mix_group):
            raise ConfigError(f"data.name={data.name!r} is drawn, and never augmented: leave augment.* alone")
        return SyntheticLoader(data, Sampler(data.train_size, global_batch_size, seed, 1, 1, *shared), device)
    val_set = open_split(data, "val", device, cache)
    own = data, torch.device(device), rank, world_size, val_set
    if not train:
        return ImageLoader(*own)
    train_set, classes = open_split(data, "train", device, cache), len(val_set.classes)
    one, other = ([normalize("NFC", name) for name in split.classes] for split in (train_set, val_set))
    if one != other:
        found = f"{len(train_set.classes)} classes to train on, {classes} held out, or other ones"
        raise DataError(f"{data.name}: {found}: give both splits the same")
    group, copies = augment.mix_group if augment.mixup or augment.cutmix else 1, augment.repeated_aug
    sampler = Sampler(len(train_set.labels), global_batch_size, seed, group, copies, *shared)
    area = data.interpolation == "area"
    transform = TrainTransform(augment, data.shape, classes, label_smoothing, seed, device, area)
    return ImageLoader(*own, train_set, sampler, transform)
