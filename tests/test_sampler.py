"""Which image stands where: the same batches for any number of processes and micro-batches."""

from dataclasses import replace
from itertools import islice

import pytest
import torch

from cpvt.data.sampler import Request, Sampler
from cpvt.errors import ConfigError
from cpvt.rng import bits, integers, normal, permutation, uniform

REPEATED = Sampler(images=1000, global_batch_size=96, seed=5, mix_group=16, repeated_aug=3)


def taken(sampler: Sampler, steps: int, start: int = 0) -> Request:
    """The micro-batches of some steps in one."""
    found = list(islice(sampler.requests(start), steps * len(sampler.micro_batches)))
    columns = zip(*((r.positions, r.groups, r.indices) for r in found), strict=True)
    return Request(found[-1].epoch, *map(torch.cat, columns))


def test_random_numbers_are_functions_of_key_and_counters_and_have_the_distributions_they_claim():
    """Within four standard errors."""
    n = torch.arange(40_000)
    u, z, k = uniform("u", n), normal("z", n), integers("k", 7, n)
    assert u[[7, 3]].equal(uniform("u", torch.tensor([7, 3])))
    assert abs(u.mean() - 0.5) < 4 * (1 / 12 / len(n)) ** 0.5 and 0 <= u.min() and u.max() < 1
    assert abs(z.mean()) < 4 / len(n) ** 0.5 and abs(z.var() - 1) < 4 * (2 / len(n)) ** 0.5
    counts = torch.bincount(k, minlength=7)
    assert len(counts) == 7 and ((counts - len(n) / 7).abs() < 4 * (len(n) / 7) ** 0.5).all()
    assert permutation("p", 50, 1).sort().values.equal(torch.arange(50)) and bits("a", n).min() >= 0
    keys = ("a", 1, 2), ("b", 1, 2), ("a", 2, 2), ("a", 1, 3), ("a", 2, 1)
    related = torch.corrcoef(torch.stack([uniform(*key, n) for key in keys])) - torch.eye(5)
    assert related.abs().max() < 4 / len(n) ** 0.5


def test_every_epoch_holds_every_image_once_in_the_order_of_recorded_rows():
    sampler = Sampler(images=100, global_batch_size=10, seed=1)
    epochs = [taken(sampler, 10, start).indices for start in (0, 10)]
    assert all(epoch.sort().values.equal(torch.arange(100)) for epoch in epochs)
    assert not epochs[0].equal(epochs[1])
    assert not taken(replace(sampler, seed=2), 10).indices.equal(epochs[0])
    first, second = taken(REPEATED, 1), taken(REPEATED, 1, start=9)
    assert first.positions[[0, 1, 2, 48, 49, 50]].tolist() == [0, 6, 12, 3, 9, 15]
    assert first.indices[:6].tolist() == [334, 702, 163, 676, 192, 525]
    assert second.epoch == 1 and second.groups.tolist() == [6, 7, 8, 9, 10, 11]
    assert second.indices[:6].tolist() == [449, 280, 114, 51, 929, 616]
    plain = taken(Sampler(100, 10, seed=1), 1, start=13)
    assert plain.indices.tolist() == [53, 21, 63, 75, 54, 25, 44, 73, 43, 74]


def test_repeated_augmentation_as_in_deit():
    """Three copies, floor(N / 256) x 256 samples, a third of the images; copies lie in different groups."""
    assert (REPEATED.samples_per_epoch, REPEATED.steps_per_epoch, REPEATED.distinct_images) == (768, 8, 256)
    epoch = taken(REPEATED, 8)
    assert sorted(epoch.indices.bincount(minlength=1000).unique().tolist()) == [0, 3]
    for batch in epoch.indices.view(8, 6, 16):
        assert batch.unique().numel() == 32  # all three copies of an image stand in one batch
        assert all(group.unique().numel() == 16 for group in batch)
    assert Sampler(images=1_281_167, global_batch_size=1024, repeated_aug=3).samples_per_epoch == 1_281_024
    assert epoch.positions.sort().values.equal(torch.arange(768)) and epoch.groups.equal(torch.arange(48))
    assert taken(REPEATED, 1, start=10).positions.equal(epoch.positions[192:288])


@pytest.mark.parametrize("world_size, most", [(1, 0), (1, 20), (2, 16), (3, 32), (6, 1000), (2, 32)])
def test_processes_and_micro_batches_cut_the_batch_between_groups(world_size, most):
    cut = replace(REPEATED, world_size=world_size, micro_batch_size=most)
    ranks = [replace(cut, rank=rank) for rank in range(world_size)]
    (size,) = {part.stop - part.start for rank in ranks for part in rank.micro_batches}
    assert size == max(s for s in (16, 32, 48, 96) if 96 // world_size % s == 0 and s <= (most or 96))
    whole, pieces = taken(REPEATED, 1, start=9), [taken(rank, 1, start=9) for rank in ranks]
    for name in ("positions", "groups", "indices"):
        assert torch.cat([getattr(piece, name) for piece in pieces]).equal(getattr(whole, name))


def test_batches_that_cannot_be_cut_are_refused():
    for words, changes in {
        "optim.global_batch_size=100 with augment.mix_group=16": dict(global_batch_size=100),
        "50 training images": dict(images=50, mix_group=1),
        "augment.repeated_aug=3": dict(mix_group=48),
        "5 processes": dict(world_size=5),
        "4 processes": dict(world_size=4),
        "optim.micro_batch_size=8": dict(micro_batch_size=8),
    }.items():
        with pytest.raises(ConfigError, match=words):
            replace(REPEATED, **changes)
