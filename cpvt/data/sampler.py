"""Which image stands where: the order of an epoch, cut into steps, processes and micro-batches.

The configuration fixes the batch of a step over all processes. Its places, 0 ... batch - 1, are cut into equal
runs for the processes, and each run into micro-batches. A sample is named by (epoch, position), its place in
the epoch's stream; everything random about it is a function of the seed and these two. So the same seed gives
the same batches for any number of workers, processes and micro-batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from cpvt.errors import ConfigError
from cpvt.rng import permutation

REFERENCE_CHUNK = 256  # DeiT cuts an epoch of repeated samples to a multiple of this


@dataclass(frozen=True)
class Stream:
    """The samples of a run.

    images   in the data set
    batch    samples a step, over all processes
    group    samples that are mixed among each other; they lie next to each other in the batch
    repeated_aug  copies of an image that stand one behind the other in the stream (repeated augmentation); they
             fall into different groups, as they fall on different processes in DeiT
    """

    images: int
    batch: int
    seed: int = 0
    group: int = 1
    repeated_aug: int = 1

    def __post_init__(self):
        if self.batch % self.group:
            raise ConfigError(
                f"optim.global_batch_size={self.batch} with augment.mix_group={self.group}: "
                "a step holds whole groups; choose a divisor"
            )
        if self.group > 1 and self.batch // self.group < self.repeated_aug:
            raise ConfigError(
                f"optim.global_batch_size={self.batch} with augment.mix_group={self.group} makes {self.batch // self.group} "
                f"groups, fewer than augment.repeated_aug={self.repeated_aug}: an image would be mixed with its own copy; "
                "choose smaller groups"
            )
        if self.samples < self.batch:
            raise ConfigError(
                f"{self.images} training images, {self.samples} samples an epoch, optim.global_batch_size={self.batch}: "
                "choose a smaller batch"
            )

    @property
    def samples(self) -> int:
        """Samples that the stream of an epoch offers; the last incomplete step is left out."""
        chunks = self.images // REFERENCE_CHUNK * REFERENCE_CHUNK
        return chunks if self.repeated_aug > 1 and chunks else self.images

    @property
    def steps(self) -> int:
        """Steps an epoch."""
        return self.samples // self.batch

    @property
    def distinct(self) -> int:
        """Different images in an epoch."""
        return -(-self.steps * self.batch // self.repeated_aug)

    def position(self, step: int) -> tuple[int, int]:
        """A step of the run, counted from 0 -> (epoch, step of that epoch)."""
        return divmod(step, self.steps)

    def places(self, step: int) -> tuple[int, Tensor]:
        """-> the epoch, and the position of the sample at each place of the batch: (batch,) int64."""
        epoch, step = self.position(step)
        groups = self.batch // self.group
        place = torch.arange(self.batch)
        return epoch, step * self.batch + place % self.group * groups + place // self.group

    def group_numbers(self, step: int) -> Tensor:
        """The number, in its epoch, of each group of the batch: (batch / group,) int64."""
        groups = self.batch // self.group
        return self.position(step)[1] * groups + torch.arange(groups)

    def indices(self, epoch: int, positions: Tensor) -> Tensor:
        """Positions of an epoch -> indices into the data set."""
        return _order(self.images, self.seed, epoch)[positions // self.repeated_aug]


@lru_cache(maxsize=2)
def _order(images: int, seed: int, epoch: int) -> Tensor:
    return permutation("order", images, seed, epoch)


@dataclass(frozen=True)
class Share:
    """The part of each batch that one process handles, `micro` images at a time."""

    rank: int = 0
    world: int = 1
    micro: int = 0  # at most; 0: all of its share at once

    def parts(self, batch: int, group: int = 1) -> list[slice]:
        """-> the micro-batches of this process, as slices of the batch; all have the same size.

        Raises ConfigError where the batch cannot be cut so that no group is torn.
        """
        if batch % self.world or batch // self.world % group:
            raise ConfigError(
                f"optim.global_batch_size={batch} for {self.world} processes with augment.mix_group={group}: each process "
                "needs an equal number of whole groups; change the batch or the group"
            )
        share = batch // self.world
        if self.micro and self.micro < group:
            raise ConfigError(
                f"optim.micro_batch_size={self.micro} is smaller than augment.mix_group={group}: "
                "a group is mixed in one piece; choose a smaller group"
            )
        sizes = (size for size in range(min(self.micro or share, share), 0, -1) if share % size == 0)
        size = next(size for size in sizes if size % group == 0)
        first = self.rank * share
        return [slice(i, i + size) for i in range(first, first + share, size)]
