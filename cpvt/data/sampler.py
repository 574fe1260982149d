"""Which image stands where: the order of an epoch, cut into steps, processes and micro-batches.

A sample is named by (epoch, position), its place in the epoch's stream; everything random about it is a
function of the seed and these two. A step takes the next positions of the stream, however many processes and
micro-batches share them: the same seed gives the same batches for all of these.

Letters: B images of a micro-batch, G groups of them that are mixed among each other.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from cpvt.errors import ConfigError
from cpvt.rng import permutation

DEIT_MULTIPLE = 256  # DeiT cuts an epoch of repeated samples to a multiple of this


@dataclass(frozen=True)
class Request:
    """A micro-batch before it is read. It stays with its images up to the step. All on the CPU.

    positions  (B,) int64: of the samples in the epoch's stream
    groups     (G,) int64: numbers of the groups in the epoch; image i is in group i // (B / G)
    indices    (B,) int64: of the images in the data set
    """

    epoch: int
    positions: Tensor
    groups: Tensor
    indices: Tensor

    def __reduce__(self):  # as arrays: each tensor would go to another process as an open file
        return _unpack, (self.epoch, *(t.numpy() for t in (self.positions, self.groups, self.indices)))


def _unpack(epoch: int, *arrays) -> Request:
    return Request(epoch, *map(torch.from_numpy, arrays))


@dataclass(frozen=True)
class Sampler:
    """The samples of a training run, and this process's part of them.

    images             in the data set
    global_batch_size  samples a step, over all processes
    mix_group          samples that are mixed among each other; they lie next to each other in the batch
    repeated_aug       copies of an image, one behind the other in the stream; they fall into other groups, as
                       they fall on other processes in DeiT
    micro_batch_size   images that the process handles at a time, at most; 0: all of its part of a batch

    Raises ConfigError where a batch cannot be cut so that no group is torn.
    """

    images: int
    global_batch_size: int
    seed: int = 0
    mix_group: int = 1
    repeated_aug: int = 1
    rank: int = 0
    world_size: int = 1
    micro_batch_size: int = 0

    def __post_init__(self):
        batch, group, copies = self.global_batch_size, self.mix_group, self.repeated_aug
        given = f"optim.global_batch_size={batch} with augment.mix_group={group}"
        if batch < 1 or not 0 <= self.rank < self.world_size:
            found = f"{given}, process {self.rank} of {self.world_size}"
            raise ConfigError(f"{found}; expected an image or more, and one of these processes")
        if batch % (self.world_size * group):
            raise ConfigError(f"{given} for {self.world_size} processes: each needs as many whole groups")
        if group > 1 and batch // group < copies:
            raise ConfigError(f"{given}, augment.repeated_aug={copies}: give a group for each copy")
        if 0 < self.micro_batch_size < group:
            micro = f"optim.micro_batch_size={self.micro_batch_size}"
            raise ConfigError(f"{given}, {micro}: give a group or more")
        if not self.steps_per_epoch:
            raise ConfigError(f"{given}: {self.images} training images are too few")

    @property
    def steps_per_epoch(self) -> int:
        """Whole ones."""
        deit = self.images // DEIT_MULTIPLE * DEIT_MULTIPLE if self.repeated_aug > 1 else 0
        return (deit or self.images) // self.global_batch_size

    @property
    def samples_per_epoch(self) -> int:
        return self.steps_per_epoch * self.global_batch_size

    @property
    def distinct_images(self) -> int:
        """Different images in an epoch."""
        return -(-self.samples_per_epoch // self.repeated_aug)

    def positions(self, step: int) -> tuple[int, Tensor]:
        """A step of the run, from 0 -> its epoch, and the position of each sample of the whole batch."""
        epoch, step = divmod(step, self.steps_per_epoch)
        groups, place = self.global_batch_size // self.mix_group, torch.arange(self.global_batch_size)
        return epoch, groups * (step * self.mix_group + place % self.mix_group) + place // self.mix_group

    @property
    def micro_batches(self) -> list[slice]:
        """Those of this process, all of one size, as parts of the batch: as few as are allowed."""
        share = self.global_batch_size // self.world_size
        sizes = range(min(self.micro_batch_size or share, share), 0, -1)
        size = next(size for size in sizes if share % size == 0 and size % self.mix_group == 0)
        first = self.rank * share
        return [slice(i, i + size) for i in range(first, first + share, size)]

    def requests(self, start_step: int = 0) -> Iterator[Request]:
        """The micro-batches of this process from a step of the run on, without end."""
        order, known = torch.empty(0), -1
        for step in count(start_step):
            epoch, positions = self.positions(step)
            if epoch != known:
                order, known = permutation("order", self.images, self.seed, epoch), epoch
            first = step % self.steps_per_epoch * self.global_batch_size
            for part in self.micro_batches:
                groups = torch.arange(first + part.start, first + part.stop, self.mix_group) // self.mix_group
                indices = order[positions[part] // self.repeated_aug]
                yield Request(epoch, positions[part], groups, indices)
