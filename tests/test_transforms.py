"""The recipe on whole batches: distributions are torchvision's and timm's, draws belong to positions."""

import math
import random
from statistics import NormalDist

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import needs_gpu
from PIL import Image
from scipy.stats import ks_2samp
from timm.data import mixup as timm_mixup
from timm.data.random_erasing import RandomErasing
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as torchvision

from cpvt.config import AugmentConfig
from cpvt.data import transforms as own
from cpvt.data.transforms import MEAN, STD, TrainTransform, beta, centre_resize, crop_boxes, normalise, resize
from cpvt.errors import ConfigError
from cpvt.rng import bits, uniform

DEIT = dict(crop=True, hflip=0.5, randaugment="rand-m9-mstd0.5-inc1", random_erasing=0.25)
DEIT |= dict(mixup=0.8, cutmix=1.0)


def alike(one, other) -> bool:
    """Kolmogorov and Smirnov's test of two samples, at about four standard deviations."""
    return ks_2samp(np.asarray(one), np.asarray(other)).pvalue > 5e-5


def noise(count: int, height: int = 40, width: int = 40, seed: int = 0) -> torch.Tensor:
    dice = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, height, width), generator=dice).to(torch.uint8)


def apart(image: torch.Tensor, other: Image.Image) -> tuple[int, float]:
    """Largest and mean difference of (3, h, w) uint8 to a PIL image, in grey levels."""
    difference = (image.int() - torch.from_numpy(np.array(other)).permute(2, 0, 1).int()).abs()
    return int(difference.max()), float(difference.float().mean())


def pil(image: torch.Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


@pytest.mark.parametrize("size, crop_pct", [(48, 0.9), (33, 1.0)])
def test_the_centre_is_torchvisions_of_pil_images(size, crop_pct):
    """Of noise, which is hardest: whatever overshoots is rounded twice."""
    for height, width in [(64, 64), (50, 67), (67, 50), (20, 31), (9, 100), (100, 9), (33, 33)]:
        images = noise(2, height, width)
        made = centre_resize(images, size, crop_pct)
        for image, ours in zip(images, made, strict=True):
            theirs = torchvision.resize(pil(image), int(size / crop_pct), Image.BICUBIC)
            worst, mean = apart(ours, torchvision.center_crop(theirs, [size, size]))
            assert worst <= 2 and mean < 0.05, (height, width)
        last = [image.permute(1, 2, 0).contiguous().permute(2, 0, 1) for image in images]  # another layout
        assert torch.equal(centre_resize(last, size, crop_pct), made)


def test_training_crops_first_and_then_resizes():
    config, images, size = AugmentConfig(crop=True), noise(12, 60, 80), 24
    sides = torch.tensor([[60, 80]] * 12)
    std, mean = (torch.tensor(v)[:, None, None] for v in (STD, MEAN))
    seen = run(config, images, size=size)[0] * std + mean
    for image, (top, left, high, wide), ours in zip(
        images, crop_boxes(config, 1, 0, torch.arange(12), *sides.T).tolist(), seen, strict=True
    ):
        theirs = torchvision.resized_crop(pil(image), top, left, high, wide, [size, size], Image.BICUBIC)
        worst, mean = apart((ours * 255).round().to(torch.uint8), theirs)
        assert worst <= 2 and mean < 0.05


@needs_gpu
@pytest.mark.parametrize("size", [(48, 48), (100, 200)])
def test_a_gpu_resizes_as_the_cpu_does_in_floats(size):
    images = noise(8, 90, 120)
    floats = F.interpolate(images.float(), size, mode="bicubic", antialias=True)
    difference = resize(images.cuda(), size).cpu().float() - floats.round().clamp(0, 255)
    assert difference.abs().max() <= 1 and (difference != 0).float().mean() < 0.01


def same_boxes(one: torch.Tensor, other: torch.Tensor, height: int, width: int) -> bool:
    """Area, ratio and place are distributed alike in two lists of boxes (n, 4)."""

    def measures(top, left, high, wide):
        places = top / (height - high).clamp(min=1), left / (width - wide).clamp(min=1)
        return high * wide, wide / high.clamp(min=1), *places

    return all(map(alike, measures(*one.T.double()), measures(*other.T.double())))


@pytest.mark.parametrize("height, width", [(375, 500), (200, 520)])
def test_crops_are_torchvisions(height, width):
    """Also their fall-backs: the second image is too wide for a fifth of the tries."""
    config, count = AugmentConfig(crop=True), 6000
    sides = torch.full((count,), height), torch.full((count,), width)
    boxes = crop_boxes(config, 3, 1, torch.arange(count), *sides)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        image, how = torch.empty(3, height, width), (list(config.crop_scale), list(config.crop_ratio))
        expected = torch.tensor([RandomResizedCrop.get_params(image, *how) for _ in range(count)])
    assert same_boxes(boxes, expected, height, width)
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] > 0).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= torch.tensor([height, width])).all()


@pytest.mark.parametrize("height, width", [(100, 400), (7, 2)])
def test_the_crop_that_fits_nowhere_is_the_largest_in_the_middle(height, width):
    """With the whole area asked for at a ratio that the image does not have, both take the fall-back."""
    config = AugmentConfig(crop=True, crop_scale=(1.0, 1.0))
    box = crop_boxes(config, 0, 0, torch.arange(1), torch.tensor([height]), torch.tensor([width]))
    how = list(config.crop_scale), list(config.crop_ratio)
    assert box[0].tolist() == list(RandomResizedCrop.get_params(torch.empty(3, height, width), *how))


def test_ribbons_single_pixels_and_impossible_ratios_go_through():
    ribbon = noise(1, 1, 60_000)[0]
    assert torch.equal(centre_resize([ribbon], 64), centre_resize([ribbon[:, :, 29_984:30_016]], 64))
    config = AugmentConfig(crop=True, crop_ratio=(2.5, 3.0), random_erasing=1.0)
    images = [noise(1, 1, 1, seed=i)[0] for i in range(3)] + [noise(1, 40, 40)[0]]
    whole, _ = run(config, images, size=32)
    assert torch.equal(whole[:2], run(config, images[:2], size=32)[0])


def test_erased_boxes_are_timms_and_hold_noise():
    count, size = 6000, (32, 48)
    boxes = own.erase_boxes(0.25, 5, 0, torch.arange(count), size)
    erased = boxes[:, 2] > 0
    assert abs(erased.double().mean() - 0.25) < 4 * math.sqrt(0.25 * 0.75 / count)
    boxes = own.erase_boxes(1.0, 5, 0, torch.arange(count), size)
    assert (boxes[:, 2:] < torch.tensor(size)).all()  # never the whole of a side
    state = random.getstate()
    random.seed(0)
    erasing, expected = RandomErasing(1.0, mode="pixel", device="cpu"), []
    with torch.random.fork_rng():
        for _ in range(2500):
            where = torch.nonzero(erasing(torch.zeros(1, *size))[0])
            low = where.amin(0) if len(where) else torch.zeros(2)
            expected.append(torch.cat([low, where.amax(0) - low + 1 if len(where) else torch.zeros(2)]))
    random.setstate(state)
    assert same_boxes(boxes, torch.stack(expected), *size)
    images = torch.full((64, 3, 40, 40), 9.0)
    boxes = own.erase_boxes(0.8, 1, 0, torch.arange(64), (40, 40))
    own.erase(images, boxes, bits("erase/noise", 1, 0, torch.arange(64)))
    values = []
    for image, (top, left, high, wide) in zip(images, boxes.tolist(), strict=True):
        values.append(image[:, top : top + high, left : left + wide].clone())
        image[:, top : top + high, left : left + wide] = 9.0
    assert (images == 9).all()  # nothing outside the boxes
    together = torch.cat([value.flatten() for value in values]).double()
    assert len(together) > 30_000
    assert alike(together, [NormalDist().inv_cdf((i + 0.5) / 10_000) for i in range(10_000)])
    # Colours, neighbours and images have nothing to do with each other.
    flat = [value.flatten(1).double() for value in values if value.numel() > 300]
    pairs = [(value[0], value[1]) for value in flat] + [(value[2, 1:], value[2, :-1]) for value in flat]
    pairs += [(a[0, :90], b[0, :90]) for a, b in zip(flat, flat[1:], strict=False)]
    products = torch.cat([a * b for a, b in pairs])
    assert abs(products.mean()) < 4 / math.sqrt(len(products))


@pytest.mark.parametrize("alpha", [0.2, 1.0, 2.0])
def test_shares_follow_the_beta_distribution(alpha):
    drawn = beta("test", alpha, torch.arange(20_000)).numpy()
    assert alike(drawn, np.random.default_rng(0).beta(alpha, alpha, 20_000))
    assert 0 <= drawn.min() and drawn.max() <= 1


@pytest.mark.parametrize("config", [dict(mixup=0.8, cutmix=1.0), dict(mixup=0.8), dict(cutmix=1.0)])
def test_mixing_is_timms(monkeypatch, config):
    """The same share and place put into timm's Mixup: the same images and labels, bit for bit."""
    config, group, count, size, classes = AugmentConfig(mix_group=6, **config), 6, 12, (30, 44), 10
    numbers = torch.arange(100, 100 + count)
    dice = torch.Generator().manual_seed(0)
    images = torch.randn(count * group, 3, *size, generator=dice)
    labels = torch.randint(classes, (count * group,), generator=dice)
    mix = own.draw_mix(config, 7, 2, numbers, size)
    made = own.mix_images(images.clone(), mix), own.mix_labels(labels, classes, 0.1, mix.share)
    assert torch.equal(own._mix(images, *mix), made[0])  # as a GPU does it
    assert set(mix.cut.tolist()) == {bool(config.cutmix), not config.mixup}
    numpys = timm_mixup.np.random
    for i, number in enumerate(numbers.tolist()):
        where = 7, 2, number
        even = iter([0.0, float(uniform("mix/which", *where))])  # first whether to mix at all
        places = iter([float(uniform(f"mix/{name}", *where)) for name in ("row", "column")])
        for name, draw in (
            ("rand", lambda even=even: next(even)),
            ("beta", lambda a, _, where=where: float(beta("mix/share", a, *where))),
            ("randint", lambda low, high, size, places=places: int(high * next(places)) + low),
        ):
            monkeypatch.setattr(numpys, name, draw)
        timms = timm_mixup.Mixup(config.mixup, config.cutmix, label_smoothing=0.1, num_classes=classes)
        mine = slice(i * group, (i + 1) * group)
        expected = timms(images[mine].clone(), labels[mine])
        assert torch.equal(made[0][mine], expected[0]) and torch.equal(made[1][mine], expected[1])
    monkeypatch.undo()


def test_which_and_how_much_is_mixed_and_the_numbers_stay_what_they_are():
    """CutMix in the asked share of groups; what it pastes is even in area, but for what the borders clip."""
    config, count = AugmentConfig(mixup=0.8, cutmix=1.0, mixup_switch_prob=0.3), 20_000
    mix = own.draw_mix(config, 0, 0, torch.arange(count), (224, 224))
    assert abs(mix.cut.double().mean() - 0.3) < 4 * math.sqrt(0.3 * 0.7 / count)
    top, bottom, left, right = mix.box[mix.cut].T
    assert torch.equal(mix.share[mix.cut], 1 - ((bottom - top) * (right - left)).double() / 224**2)
    assert (mix.box >= 0).all() and (mix.box <= 224).all()
    dice, count = torch.Generator().manual_seed(0), 16
    sides = [(30 + 2 * i, 60 - i) for i in range(count)]
    images = [torch.randint(0, 256, (3, *side), generator=dice).to(torch.uint8) for side in sides]
    config, positions = AugmentConfig(**DEIT, mix_group=4), torch.arange(640, 656)
    where = dict(positions=positions, groups=torch.arange(160, 164), seed=3, epoch=2, size=32)
    pixels, targets = run(config, images, **where)
    assert float(pixels.double().sum()) == pytest.approx(15182.1028, abs=1e-3)
    assert pixels[3, 1, 5, 7:10].tolist() == pytest.approx([-1.0028, -1.4405, -0.8452], abs=1e-4)
    assert targets[5, 4:8].tolist() == pytest.approx([0.01, 0.2472, 0.6728, 0.01], abs=1e-4)


def run(config, images, labels=None, positions=None, groups=None, *, seed=1, epoch=0, size=None):
    transform, places = (
        TrainTransform(config, size or images[0].shape[1], 10, 0.1, seed),
        torch.arange(len(images)),
    )
    labels = places % 10 if labels is None else labels
    positions = places if positions is None else positions
    groups = places[: len(images) // config.mix_group] if groups is None else groups
    return transform(images, labels, epoch, positions, groups)


def test_a_worker_makes_a_batch_in_the_memory_that_it_shares(monkeypatch):
    """Or it would be copied there, on its way to the main process."""
    config = AugmentConfig(**DEIT, mix_group=4)
    assert not run(config, noise(4))[0].is_shared()
    monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda: "a worker's")
    assert run(config, noise(4))[0].is_shared()


def test_a_batch_is_its_micro_batches():
    """Cut, in another order of groups, again: the same images, bit for bit, and of any shape."""
    config = AugmentConfig(**DEIT, mix_group=4)
    images = [noise(1, 20 + 3 * i, 60 - 2 * i, seed=i)[0] for i in range(16)]
    labels = torch.randint(10, (16,), generator=torch.Generator().manual_seed(3))
    positions, groups = torch.arange(640, 656), torch.arange(160, 164)

    def part(*index, **how):
        chosen = torch.arange(16).view(4, 4)[list(index)].flatten()
        mine = [images[i] for i in chosen]
        return run(config, mine, labels[chosen], positions[chosen], groups[list(index)], size=(28, 36), **how)

    whole = part(0, 1, 2, 3)
    assert whole[0].shape == (16, 3, 28, 36) and whole[1].shape == (16, 10) and whole[0].isfinite().all()
    for which in (0, 1):
        pieces = [part(0, 1)[which], part(2)[which], part(3)[which]]
        assert torch.equal(torch.cat(pieces), whole[which])
        groupwise = whole[which].unflatten(0, (4, 4))
        assert torch.equal(part(2, 0, 3, 1)[which].unflatten(0, (4, 4)), groupwise[[2, 0, 3, 1]])
    for other in (dict(seed=2), dict(epoch=1)):
        assert (part(0, 1, 2, 3, **other)[0] != whole[0]).flatten(1).any(1).all()
    with pytest.raises(ConfigError, match="6 images.*mix_group=4"):
        run(config, images[:6], groups=groups[:1])


def test_no_augmentation_is_the_centre_and_flips_mirror_it():
    images, labels = noise(6, 32, 32), torch.tensor([3, 1, 4, 1, 5, 9])
    before = images.clone()
    seen, targets = run(AugmentConfig(), images, labels)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    assert torch.equal(seen, (images.float() / 255 - mean) / std) and torch.equal(images, before)
    assert targets is labels or torch.equal(targets, labels)
    assert seen.dtype == torch.float32 and targets.dtype == torch.int64
    wide, _ = run(AugmentConfig(), [F.pad(image, (7, 7)) for image in images], labels, size=32)
    assert torch.equal(wide, seen)
    config = AugmentConfig(hflip=0.3)
    images, count = noise(400, 8, 8), 400
    seen, _ = run(config, images)
    plain, _ = run(AugmentConfig(), images)
    mirrored = (seen == plain.flip(3)).flatten(1).all(1)
    assert (mirrored | (seen == plain).flatten(1).all(1)).all()
    assert abs(mirrored.double().mean() - 0.3) < 4 * math.sqrt(0.3 * 0.7 / count)
    cropped, mirrored = (run(AugmentConfig(crop=True, hflip=p), images[:20], size=6)[0] for p in (0.0, 1.0))
    assert torch.equal(cropped.flip(3), mirrored)


@pytest.mark.parametrize("height, width, level", [(1, 1, 200), (50, 2, 255)])
def test_odd_images_go_through(height, width, level):
    """One pixel, one row, black, white, grey: finite, of the right shape; grey stays grey until erased."""
    config = AugmentConfig(**{**DEIT, "random_erasing": 0.0}, mix_group=8)
    images = [torch.full((3, height, width), level, dtype=torch.uint8)] * 32
    seen, targets = run(config, images, size=24)
    assert seen.shape == (32, 3, 24, 24) and seen.isfinite().all()
    assert torch.allclose(targets.sum(1), torch.ones(32)) and targets.dtype == torch.float32
    still, _ = run(AugmentConfig(crop=True, hflip=0.5), images, size=24)
    assert torch.equal(still, normalise(torch.full((32, 3, 24, 24), level / 255)))


@needs_gpu
@pytest.mark.parametrize("stance", ["force_eager", "default"])
def test_on_a_gpu_the_batch_is_the_same(stance):
    """The same draws, of smooth images: apart by one grey level of crop or move, in few places more."""
    config = AugmentConfig(**{**DEIT, "random_erasing": 0.0}, mix_group=16)  # whose noise is the GPU's own
    images = F.interpolate(noise(64, 9, 7).float(), (90, 70), mode="bilinear").to(torch.uint8)
    sample = torch.arange(64) % 10, 0, torch.arange(64), torch.arange(4)
    expected, targets = TrainTransform(config, 48, 10, 0.1, 3)(images, *sample)
    with torch.compiler.set_stance(stance):
        seen, soft = TrainTransform(config, 48, 10, 0.1, 3, "cuda")(images.cuda(), *sample)
    assert seen.is_cuda and torch.equal(soft.cpu(), targets)
    level = 1.01 / 255 / min(STD)
    assert ((seen.cpu() - expected).abs() > level).double().mean() < 0.05


@pytest.mark.parametrize("crop_pct", [1.0, 0.875])
@pytest.mark.parametrize("shape", [(40, 61), (61, 40), (32, 32), (24, 300)])
def test_a_turned_image_at_a_turned_size_is_resized_to_the_same(shape, crop_pct):
    """And the size need not be a square; where it has the image's shape, nothing is cut off."""
    wave = torch.linspace(0, 9, shape[0])[:, None].sin() + torch.linspace(0, 7, shape[1]).cos()
    image = (128 + 50 * wave).byte().expand(1, 3, *shape)
    for size in ((16, 28), (28, 16), (16, 16), (8, 100)):
        here = centre_resize(image, size, crop_pct)
        turned = centre_resize(image.transpose(2, 3), size[::-1], crop_pct).transpose(2, 3)
        assert here.shape == (1, 3, *size) and here.float().std() > 5
        assert (here.int() - turned.int()).abs().max() <= 1  # one axis is rounded before the other
    double = shape[0] * 2, shape[1] * 2
    assert torch.equal(centre_resize(image, double), resize(image, double))
