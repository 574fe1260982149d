"""The synthetic tasks are what they claim to be, read back from their pixels, and the same on any machine."""

import hashlib

import pytest
import torch
from encoded import refusal
from helpers import needs_gpu

from cpvt.data import synthetic
from cpvt.data.synthetic import draw
from cpvt.rng import mix

TASKS = tuple(synthetic.CLASSES)
CASES = [(task, split) for task in TASKS for split in synthetic.SPLITS]
STEPS = ((0, 1), (1, 0), (1, 1), (1, -1))  # from each token of a shape to its next, in the order of SHAPES


def tokens(batch, pixels=1):
    """What is seen, read back: 0 background, 1 A, 2 B for every token, (n, H, W)."""
    colours = torch.tensor((synthetic.BACKGROUND, synthetic.COLOUR_A, synthetic.COLOUR_B))
    corners = batch.images[:, :, ::pixels, ::pixels]
    match = (corners[:, None] == colours[None, :, :, None, None]).all(dim=2)
    assert (match.sum(dim=1) == 1).all(), "a token has a colour of no object"
    return match.int().argmax(dim=1)


def box(mask):
    """First and last filled row, first and last filled column, of one (H, W) image."""
    rows, columns = mask.nonzero().unbind(dim=1)
    return rows.min().item(), rows.max().item(), columns.min().item(), columns.max().item()


def shapes(batch):
    """The number of the shape in each image of *what*, whose cells are single tokens."""
    found = []
    for image in tokens(batch):
        filled = image.nonzero()  # rows from the top down, each from the left
        [step] = filled.diff(dim=0).unique(dim=0).tolist()
        assert len(filled) == 3
        found.append(STEPS.index(tuple(step)))
    return torch.tensor(found)


@pytest.mark.parametrize("grid, size", [((14, 14), 1), ((9, 17), 1), ((20, 10), 2)])
def test_where_is_read_back_from_the_pixels(grid, size):
    height, width = grid
    d = draw("where", range(300), grid=grid, size=size)
    for i, image in enumerate(tokens(d)):
        top, bottom, left, right = box(image == 1)
        assert (image == 1).sum() == size * size == (bottom - top + 1) * (right - left + 1)
        assert (top, left) == (d.rows[i], d.columns[i])
        below, beside = 2 * top >= height, 2 * left >= width
        assert below or 2 * (bottom + 1) <= height, "the object lies across the middle row"
        assert beside or 2 * (right + 1) <= width, "the object lies across the middle column"
        assert d.labels[i] == 2 * below + beside
        assert d.distance[i] == min(top, left, height - 1 - bottom, width - 1 - right)
        assert d.border[i].tolist() == [min(top, height - 1 - bottom), min(left, width - 1 - right)]
    assert set(d.distance.tolist()) == set(range(min(height // 2, width // 2) - size + 1))


@pytest.mark.parametrize("grid, size", [((14, 14), 2), ((9, 17), 1)])
def test_arrangement_is_read_back_from_the_pixels(grid, size):
    height, width = grid
    d = draw("arrangement", range(300), grid=grid, size=size)
    for i, image in enumerate(tokens(d)):
        assert (image == 1).sum() == (image == 2).sum() == size * size, "clipped or overlapped"
        a, b = box(image == 1), box(image == 2)
        assert a[:2] == b[:2] == (d.rows[i, 0], d.rows[i, 0] + size - 1)
        assert [a[2], b[2]] == d.columns[i].tolist()
        assert d.labels[i] == (b[2] < a[2])
        assert d.distance[i] == (b[2] - a[3] if a[2] < b[2] else a[2] - b[3]) >= 2
        left, right = min(a[2], b[2]), max(a[3], b[3])
        assert d.border[i].tolist() == [min(a[0], height - 1 - a[1]), min(left, width - 1 - right)]
    assert d.border.min() >= 2
    assert set(d.distance.tolist()) == set(range(2, width - 2 - 2 * size))


@pytest.mark.parametrize("grid, split", [((14, 14), "train"), ((10, 11), "val"), ((9, 17), "test")])
def test_what_is_read_back_from_the_pixels(grid, split):
    height, width = grid
    d = draw("what", range(400), grid=grid, split=split)
    shape = shapes(d)
    assert d.labels.equal(shape % 2)
    for i, image in enumerate(tokens(d)):
        top, bottom, left, right = box(image == 1)
        row, column = (top + bottom) // 2 - 1, (left + right) // 2 - 1  # shapes share the centre of the frame
        assert [row, column] == [d.rows[i, 0], d.columns[i, 0]]
        assert d.border[i].tolist() == [min(row, height - 3 - row), min(column, width - 3 - column)]
        assert d.distance[i] == d.border[i].min() >= 2
        if shape[i] < 2:  # a bar
            assert 2 * left >= width if split == "test" else 2 * (right + 1) <= width
    assert set(shape.tolist()) == ({0, 1, 2, 3} if split == "train" else {0, 1})
    if split == "train":
        assert set(d.columns[shape < 2, 0].tolist()) == {2, 3, 4}
        assert set(d.columns[shape >= 2, 0].tolist()) == set(range(2, 10))
    assert set(shapes(draw("what", range(99), grid=grid, split=split, pair="diagonals")).tolist()) == {2, 3}


@pytest.mark.parametrize("task", TASKS)
def test_a_bag_of_tokens_knows_nothing_and_a_sample_is_the_same_in_any_batch(task):
    """Every sample holds the same multiset of tokens, whatever its label."""
    d = draw(task, range(64), grid=(20, 20), size=2, pixels=3)
    patches = d.images.unfold(2, 3, 3).unfold(3, 3, 3)
    bags = patches.permute(0, 2, 3, 1, 4, 5).reshape(64, 400, -1)
    bags = [sorted(map(tuple, bag.tolist())) for bag in bags]
    assert all(bag == bags[0] for bag in bags)
    assert len(set(bags[0])) == (3 if task == "arrangement" else 2)
    # And labels are balanced in every run, in no fixed order.
    classes, labels = len(synthetic.CLASSES[task]), draw(task, range(8, 1208)).labels
    assert (labels.reshape(-1, classes).sort(dim=1).values == torch.arange(classes)).all()
    assert len(set(labels[::classes].tolist())) == classes
    whole = draw(task, range(100), seed=3)
    shuffled = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    for index in (range(40, 60), [7], shuffled, torch.arange(0, 100, 7, dtype=torch.int32)):
        part = draw(task, index, seed=3)
        for name in ("images", "labels", "distance", "border", "rows", "columns"):
            assert getattr(part, name).equal(getattr(whole, name)[[*map(int, index)]]), name
    small, large = draw(task, range(50)), draw(task, range(50), pixels=2)
    assert large.images.equal(small.images.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))
    filled = {}
    for scale in synthetic.SCALES:
        for side in (14, 28):
            d = draw(task, range(20), grid=(side, side), scale=scale)
            (filled[scale, side],) = set((tokens(d) > 0).sum(dim=(1, 2)).tolist())
    assert filled["tokens", 28] == filled["tokens", 14] == filled["share", 14]
    assert filled["share", 28] == 4 * filled["share", 14]


@pytest.mark.parametrize("task, split", CASES)
def test_what_is_recorded_does_not_tell_the_label(task, split):
    d = draw(task, range(20_000), split=split)
    recorded = [d.distance, d.border[:, 0], d.border[:, 1]]
    recorded += [d.rows[:, 0] * 14 + d.columns[:, 0]] if task == "what" else []
    # Nor do the filled positions of an arrangement, which the two share.
    recorded += [d.columns.amin(dim=1), d.columns.amax(dim=1)] if task == "arrangement" else []
    for numbers in recorded:
        laws = [numbers[d.labels == c].bincount(minlength=196) for c in d.labels.unique()]
        assert all(((law - laws[0]) / (d.labels == 0).sum()).abs().max() < 0.03 for law in laws)


@pytest.mark.parametrize("task, allowed", [("where", (0, 3, 6)), ("arrangement", (2, 9))])
def test_distances_are_covered_evenly_and_can_be_fixed(task, allowed):
    n = 6000
    natural = draw(task, range(n)).distance.bincount()
    natural = natural[natural > 0]
    assert (natural / n * len(natural) - 1).abs().max() < 0.15
    some = draw(task, range(n), distances=allowed)
    assert set(some.distance.tolist()) == set(allowed)
    for label in range(len(some.classes)):  # neither classes nor distances crowd together
        share = (some.distance[some.labels == label] == allowed[0]).double().mean()
        assert share == pytest.approx(1 / len(allowed), abs=0.06)


def test_the_hash_is_splitmix64_and_samples_do_not_change_with_the_version():
    found = [value % 2**64 for value in mix(torch.tensor([1, 2, 3])).tolist()]
    assert found == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F], "as published, from seed 0"
    digest = hashlib.sha256()  # recorded rows rest on these images
    for task, split in CASES:
        d = draw(task, range(1000, 1100), seed=1, split=split)
        digest.update(d.images.numpy().tobytes() + d.labels.numpy().tobytes())
    assert digest.hexdigest() == "e392eaa4cab810b74fb8c87e372046129f40dfb6969c90d2aa5e71f941cf99a4"


@needs_gpu
@pytest.mark.parametrize("task", TASKS)
def test_a_gpu_draws_the_same(task):
    here, there = draw(task, torch.arange(500)), draw(task, torch.arange(500, device="cuda"))
    assert there.images.is_cuda
    assert here.images.equal(there.images.cpu()) and here.labels.equal(there.labels.cpu())


def test_wrong_arguments_are_refused_in_one_line():
    wrong = {
        "'were'": dict(task="were"),
        "'validation'": dict(split="validation"),
        "pixels=0": dict(pixels=0),
    }
    wrong |= {"'bar'": dict(task="what", pair="bar"), "pair='bars'": dict(pair="bars")}
    wrong |= {"0 to 6": dict(distances=(0, 7)), "distances=(3,)": dict(task="what", distances=(3,))}
    for message, arguments in wrong.items():
        assert message in refusal(draw, **{"task": "where", "index": range(4), **arguments})
    for task, size, height, width in (("where", 4, 8, 8), ("arrangement", 1, 5, 7), ("what", 1, 7, 10)):
        assert len(draw(task, range(20), grid=(height, width), size=size).images) == 20
        for smaller in ((height - 1, width), (height, width - 1)):
            assert f"{height} x {width}" in refusal(draw, task, range(20), grid=smaller, size=size)
