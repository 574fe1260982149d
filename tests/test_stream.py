"""Which image stands where: the same batches for any number of processes and micro-batches."""

import pytest
import torch

from cpvt.data.sampler import Share, Stream
from cpvt.errors import ConfigError
from cpvt.rng import bits, integers, normal, permutation, uniform

REPEATED = Stream(images=1000, batch=96, seed=5, group=16, repeated_aug=3)


def test_random_numbers_are_functions_of_key_and_counters():
    position = torch.arange(1000)
    assert torch.equal(uniform("a", 1, 2, position)[[7, 3]], uniform("a", 1, 2, torch.tensor([7, 3])))
    draws = [
        uniform(*key, position) for key in (("a", 1, 2), ("b", 1, 2), ("a", 2, 2), ("a", 1, 3), ("a", 2, 1))
    ]
    for i, one in enumerate(draws):  # independent of each other, as far as a correlation can tell (4 sigma)
        for other in draws[:i]:
            assert abs(torch.corrcoef(torch.stack([one, other]))[0, 1]) < 4 / 1000**0.5
    assert int(bits("a", position).min()) >= 0


def test_random_numbers_have_the_distributions_they_claim():
    n = torch.arange(40_000)
    u, z, k = uniform("u", n), normal("z", n), integers("k", 7, n)
    assert abs(u.mean() - 0.5) < 4 * (1 / 12 / len(n)) ** 0.5 and 0 <= u.min() and u.max() < 1
    assert abs(z.mean()) < 4 / len(n) ** 0.5 and abs(z.var() - 1) < 4 * (2 / len(n)) ** 0.5
    counts = torch.bincount(k, minlength=7)
    assert len(counts) == 7 and ((counts - len(n) / 7).abs() < 4 * (len(n) / 7) ** 0.5).all()
    assert permutation("p", 50, 1).sort().values.equal(torch.arange(50))


def test_an_epoch_holds_every_image_once_and_the_next_in_another_order():
    stream = Stream(images=100, batch=10, seed=1)
    epochs = []
    for epoch in range(2):
        order = []
        for step in range(stream.steps):
            found, positions = stream.places(epoch * stream.steps + step)
            assert found == epoch
            order.append(stream.indices(epoch, positions))
        epochs.append(torch.cat(order))
        assert epochs[-1].sort().values.equal(torch.arange(100))
    assert not epochs[0].equal(epochs[1])
    assert not Stream(100, 10, seed=2).indices(0, torch.arange(100)).equal(epochs[0])


def test_repeated_augmentation_as_in_deit():
    """Three copies, floor(N / 256) x 256 samples, a third of the images; the copies lie in different groups."""
    assert REPEATED.samples == 768 and REPEATED.steps == 8 and REPEATED.distinct == 256
    seen = torch.zeros(1000, dtype=torch.int64)
    for step in range(REPEATED.steps):
        epoch, positions = REPEATED.places(step)
        index = REPEATED.indices(epoch, positions)
        seen += torch.bincount(index, minlength=1000)
        assert index.unique().numel() == 32  # all three copies of an image stand in one batch
        for group in index.view(-1, REPEATED.group):
            assert group.unique().numel() == len(group)
    assert sorted(seen.unique().tolist()) == [0, 3]
    assert Stream(images=1281167, batch=2048, repeated_aug=3, group=128).samples == 1281024


def test_positions_and_groups_are_named_once_an_epoch():
    positions = torch.cat([REPEATED.places(step)[1] for step in range(REPEATED.steps)])
    groups = torch.cat([REPEATED.group_numbers(step) for step in range(REPEATED.steps)])
    assert positions.sort().values.equal(torch.arange(768)) and groups.equal(torch.arange(768 // 16))
    assert REPEATED.places(REPEATED.steps + 2)[1].equal(REPEATED.places(2)[1])


@pytest.mark.parametrize("world", [1, 2, 3, 6])
@pytest.mark.parametrize("micro", [0, 16, 20, 32, 1000])
def test_shares_cut_the_batch_into_equal_parts_between_groups(world, micro):
    parts = [part for rank in range(world) for part in Share(rank, world, micro).parts(96, 16)]
    assert torch.cat([torch.arange(96)[part] for part in parts]).equal(torch.arange(96))
    (size,) = {part.stop - part.start for part in parts}
    assert size % 16 == 0 and all(part.start % 16 == 0 for part in parts)
    assert size == max(s for s in (16, 32, 48, 96) if 96 // world % s == 0 and s <= (micro or 96))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Stream(1000, 100, group=16), "optim.global_batch_size=100 with augment.mix_group=16"),
        (lambda: Stream(50, 64), "50 training images"),
        (lambda: Share(0, 5).parts(96, 16), "5 processes"),
        (lambda: Share(0, 4).parts(96, 16), "whole groups"),
        (lambda: Share(0, 2, micro=8).parts(96, 16), "optim.micro_batch_size=8 is smaller"),
    ],
)
def test_batches_that_cannot_be_cut_are_refused(make, words):
    with pytest.raises(ConfigError, match=words):
        make()
