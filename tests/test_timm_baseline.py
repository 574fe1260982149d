"""timm's loader in our loop: the same images, recipe, steps and evaluation; and the experiment built on it."""

import dataclasses
from functools import partial
from itertools import islice

import pytest
import torch
from helpers import EVERYTHING, small_run
from PIL import Image
from torch import distributed

from cpvt.config import AugmentConfig, DataConfig, replace
from cpvt.data.datasets import open_dataset
from cpvt.data.transforms import MEAN, STD
from cpvt.errors import ConfigError
from cpvt.lab.experiments import jobs
from cpvt.lab.metrics import first_classes, score_pipeline
from cpvt.lab.runner import run_job
from cpvt.lab.timm_baseline import _posterize, timm_batches, timm_loader

CLASSES, EACH = 3, 24  # of the small folder
ONCE = replace(EVERYTHING, repeated_aug=1, mix_group=8)


@pytest.fixture
def opened(image_folder):
    """Batches of eight 16-pixel images by either side, with options."""
    data = DataConfig(name=str(image_folder), image_size=16, store="files", workers=0, crop_pct=0.875)
    options = dict(global_batch_size=8, seed=0, augment=ONCE, label_smoothing=0.1)
    return lambda kind=timm_batches, **more: kind(data, classes=CLASSES, **options | more)


def taken(batches, count, start=0):
    return list(islice(batches.train_batches(start), count))


def test_an_epoch_holds_every_image_once_and_the_seed_decides(opened):
    """No image is mixed here, so the labels tell: each class comes as often as it has images."""
    batches = opened(augment=AugmentConfig(crop=True))
    steps = batches.sampler.steps_per_epoch
    assert steps == CLASSES * EACH // 8
    epochs = [taken(batches, steps, start) for start in (0, steps)]
    for number, epoch in enumerate(epochs):
        labels = torch.cat([batch.targets for batch in epoch])
        assert labels.bincount().tolist() == [EACH] * CLASSES
        assert {batch.request.epoch for batch in epoch} == {number}
    assert not torch.equal(epochs[0][0].images, epochs[1][0].images)
    one, again, other = (next(opened(seed=seed).train_batches(0)) for seed in (0, 0, 1))
    assert torch.equal(one.images, again.images) and torch.equal(one.targets, again.targets)
    assert not torch.equal(one.images, other.images)


def test_steps_and_places_are_those_of_our_own_batches(opened):
    ours, theirs = (taken(opened(kind), 20) for kind in (first_classes, timm_batches))
    for own, other in zip(ours, theirs, strict=True):
        assert own.images.shape == other.images.shape and own.images.dtype == other.images.dtype
        assert own.targets.shape == other.targets.shape and own.targets.dtype == other.targets.dtype
        assert own.request.epoch == other.request.epoch
        assert own.request.positions.equal(other.request.positions)


def test_images_and_targets_are_distributed_as_ours_and_a_batch_shares_one_draw(opened):
    """Pixels and labels of 90 batches: means within five standard errors; pairs are mirrored in their labels."""
    ours, theirs = (taken(opened(kind), 90) for kind in (first_classes, timm_batches))

    def measures(batch):
        """Brightness, contrast, share of the own class, classes of a target."""
        shares = batch.targets.amax(1).mean(), (batch.targets > 0.1).sum(1).float().mean()
        return torch.stack([batch.images.mean(), batch.images.var(), *shares])

    a, b = (torch.stack([measures(batch) for batch in side]) for side in (ours, theirs))
    error = ((a.var(0) + b.var(0)) / len(a)).sqrt()
    assert ((a.mean(0) - b.mean(0)).abs() < 5 * error).all()
    assert (error < 0.1 * a.mean(0).abs().clamp(min=0.5)).all(), "this test would notice nothing"
    for batch in taken(opened(), 10):
        assert torch.allclose(batch.targets.sum(1), torch.ones(8))
        own = batch.targets.amax(1)
        mixed = own < own.max() - 1e-6  # partners of one class stay as they are
        assert torch.equal(mixed, mixed.flip(0))


def test_repeats_follow_each_other_and_magnitude_ten_is_not_an_error(image_folder):
    source = open_dataset(image_folder, "train")
    augment = replace(EVERYTHING, repeated_aug=3)
    loader = timm_loader(source, 8, 16, augment, "cpu", 0)
    order = list(loader.sampler)
    assert not distributed.is_initialized()
    assert order[0::3] == order[1::3] == order[2::3] and len(set(order)) == len(order) // 3
    source = open_dataset(image_folder, "train")
    image = Image.open(source.path(0))
    assert not any(_posterize(image, 0).convert("L").tobytes())
    assert _posterize(image, 8).tobytes() == image.tobytes()
    strongest = AugmentConfig(crop=True, randaugment="rand-m10-mstd0-n4-inc1")
    loader = timm_loader(source, 8, 16, strongest, "cpu", 0)
    assert sum(len(images) for _ in range(3) for images, _ in loader) == 3 * CLASSES * EACH


def test_normalised_as_ours(tmp_path):
    """Plain grey through either side, without chance: the same number a channel."""
    for split in ("train", "val"):
        (tmp_path / split / "n0").mkdir(parents=True)
        for i in range(8):
            Image.new("RGB", (20, 20), (128, 128, 128)).save(tmp_path / split / "n0" / f"{i}.png")
    data = DataConfig(name=str(tmp_path), image_size=16, store="files", workers=0)
    expected = (128 / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    options = {"classes": 1, "global_batch_size": 8, "seed": 0, "augment": AugmentConfig(crop=True)}
    for kind in (first_classes, timm_batches):
        images = taken(kind(data, **options), 1)[0].images
        assert (images - expected[:, None, None]).abs().max() < 1e-5


def test_only_files_in_one_process(image_folder, opened):
    held = DataConfig(name=str(image_folder), image_size=16, store="memory")
    with pytest.raises(ConfigError, match="store='memory'.*files"):
        timm_batches(held, classes=2, global_batch_size=8, seed=0, augment=ONCE)
    for options in ({"world_size": 2}, {"augment": EVERYTHING}):
        with pytest.raises(ConfigError, match="2 processes|repeated_aug=2"):
            opened(**options)
    with pytest.raises(ConfigError, match="always crops"):
        timm_loader(open_dataset(image_folder), 8, 16, replace(ONCE, crop=False), "cpu", 0)


def test_a_row_of_the_experiment(image_folder):
    """In small: steps, named data, what was evaluated on, and scores; the same digest for either pipeline."""
    config, found = replace(small_run(image_folder), augment=replace(ONCE, mix_group=4)), []
    for job in jobs("pipelines")[:2]:
        make = partial(job.make_loader.func, classes=2)
        small = {"config": config, "make_loader": make, "score": partial(score_pipeline, classes=2)}
        found.append(run_job(dataclasses.replace(job, **small), "abc", {})[0])
    assert found[0].dataset_sha256 == found[1].dataset_sha256
    for result in found:
        assert result.dataset.endswith("its first 2 classes") and result.metrics["loss"] < 5
        assert (result.metrics["images"], result.metrics["steps"]) == (14, 12)
