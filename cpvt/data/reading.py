"""Where the images of a run come from: memory, or files that processes of their own read.

Letters: B images of a micro-batch.
"""

from __future__ import annotations

import hashlib
import os
import signal
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple

import numpy
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from cpvt.config import DataConfig
from cpvt.data.datasets import ImageTensors
from cpvt.data.decode import DecodedChunk, Decoder, Fault
from cpvt.errors import DataError

CHUNK = 128  # images that one reading process handles at a time


class Indices(NamedTuple):
    """A request for images and nothing else."""

    indices: Tensor | numpy.ndarray


class Held:
    """Images in memory, on the device."""

    def __init__(self, tensors: ImageTensors, device: str):
        self.classes, self.fingerprint = tensors.classes, tensors.fingerprint
        self.images, self.labels = tensors.images.to(device), tensors.labels.to(device)

    def __len__(self) -> int:
        return len(self.labels)

    def start(self) -> None: ...

    def read(self, lists: Iterable[Tensor]) -> Iterator[DecodedChunk]:
        for index in lists:
            index = index.to(self.images.device)
            yield DecodedChunk(Indices(index), self.images[index], self.labels[index], [])


class Filed:
    """Images in files or shards: bytes are read by processes of their own and decoded on the device."""

    def __init__(self, source, data: DataConfig, device: str, decode_jpegs=None):
        self.source, self.device, self.classes = source, device, source.classes
        self._decoder = Decoder(source, device, data.decode, decode_jpegs)
        beside = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes of this run on this machine
        own = max(1, min(len(os.sched_getaffinity(0)) // beside, 16))
        self.workers = own if data.workers < 0 else data.workers
        self._lists = _Next()
        # The loader is held from outside, so that it is never part of a cycle: the garbage collector would
        # close its pipes in any order, some of them twice, and so perhaps a file of somebody else's.
        self._held: dict[str, DataLoader] = {}
        weakref.finalize(self, self._held.clear)

    def __len__(self) -> int:
        return len(self.source)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what the shards hold; of a folder, of its file names and labels."""
        own = getattr(self.source, "fingerprint", None)
        if own:
            return own
        digest = hashlib.sha256(repr(self.classes).encode())
        for i, label in enumerate(self.source.labels):
            name = "/".join(self.source.key(i).split("/")[-2:])  # wherever the folder lies
            digest.update(f"{name}\t{int(label)}\n".encode())
        return digest.hexdigest()

    def read(self, lists: Iterable[Tensor]) -> Iterator[DecodedChunk]:
        pieces: deque[int] = deque()

        def chunks() -> Iterator[Indices]:
            for index in lists:
                split = index.split(CHUNK)
                pieces.append(len(split))
                yield from (Indices(part.numpy()) for part in split)  # tensors would be shared memory

        self.start()
        self._lists.now = chunks()
        fetched = iter(self._held["loader"])

        def decoded() -> Iterator[DecodedChunk]:
            for first in fetched:
                rest = islice(fetched, pieces.popleft() - 1)
                yield _joined([self._decoder(part) for part in (first, *rest)], self.device)

        return decoded()

    def start(self) -> None:
        """Starts the reading processes, which then wait for work."""
        if self._held:
            return
        options = {}
        if self.workers:
            options = {"prefetch_factor": 2, "multiprocessing_context": "fork", "persistent_workers": True}
            options["worker_init_fn"] = _stand_apart
        self._held["loader"] = DataLoader(
            self._decoder.reader, batch_size=None, sampler=self._lists, num_workers=self.workers, **options
        )
        for _ in self._held["loader"]:  # nothing to read yet
            pass


def refuse_ruins(faults: list[Fault], count: int) -> None:
    """A few unusable images are replaced and named; when most are, it is the disk."""
    spoiled = {fault.index for fault in faults}
    if len(spoiled) > max(count // 2, 8):
        first = faults[0]
        raise DataError(
            f"{len(spoiled)} of {count} images of a micro-batch cannot be used (the first: {first.key}, "
            f"{first.reason}): see to the disk, then give the same command again"
        )


class _Next:
    """A sampler that gives what `now` holds, once: DataLoader keeps its processes and is given new lists."""

    def __init__(self):
        self.now: Iterable[Indices] = ()

    def __iter__(self) -> Iterator[Indices]:
        lists, self.now = self.now, ()
        return iter(lists)


def _stand_apart(worker: int) -> None:
    """Puts a reader into a process group of its own: a signal to the run's group, as torchrun and a terminal send
    it, is the main process's to answer, and it still needs its readers. SLURM may send SIGUSR1 to all."""
    os.setpgrp()
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def _joined(parts: list[DecodedChunk], device: str) -> DecodedChunk:
    return DecodedChunk(
        parts[0].request,
        [image for part in parts for image in part.images],
        torch.cat([part.labels for part in parts]).to(device),
        [fault for part in parts for fault in part.faults],
        sum(part.refused for part in parts),
    )
