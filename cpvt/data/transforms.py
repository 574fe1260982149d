"""What is done to the images of a training batch, on whole batches, on the device they lie on.

Crop and resize, flip, RandAugment, normalise, erase, mix: in this order. Up to the RandAugment the pixels are
uint8 between the steps, as in timm, then float32.

Every draw is a function of (seed, epoch, position), or of (seed, epoch, group) where a group shares it, and made
on the CPU but for the erasing noise: an image meets the same fate in any micro-batch, process or worker.

Letters: B images, G groups of g images mixed among each other, (H, W) what the model sees, K classes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import default_collate

from cpvt.config import AugmentConfig, Grid, pair
from cpvt.data.randaugment import at_once, draw_policy, fused, parse, rand_augment, send
from cpvt.errors import ConfigError
from cpvt.rng import bits, uniform

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, the field's convention
TRIES = 10  # boxes drawn for a crop or for what is erased, of which the first that fits is taken

# --------------------------------------------------------------------------- resize


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, 3, h, w) uint8 -> (B, 3, *size): Pillow's antialiased bicubic; a GPU rounds only at the end."""
    if not images.is_cuda:
        return F.interpolate(images, size, mode="bicubic", antialias=True)
    if images.shape[2] > 40 * size[0] or images.shape[3] > 40 * size[1]:  # CUDA's filter has no room
        return resize(images.cpu(), size).to(images.device)
    images = F.interpolate(images.float(), size, mode="bicubic", antialias=True)  # CUDA: of floats alone
    return images.round_().clamp_(0, 255).to(torch.uint8)


def centre_resize(images: Sequence[Tensor] | Tensor, size: int | Grid, crop_pct: float = 1.0) -> Tensor:
    """B images (3, h, w) uint8 -> (B, 3, *size): resized until they just cover size / crop_pct, then the centre,
    with the roundings of torchvision's `Resize` and `CenterCrop`. `size`: (H, W), or the side of a square."""
    (H, W), centres = pair(size), []
    high, wide = int(H / crop_pct), int(W / crop_pct)
    for part in [images] if isinstance(images, Tensor) else [image[None] for image in images]:
        for axis in (2, 3):  # of a ribbon only the middle, or enlarged it would fill the memory
            if (most := 32 * min(part.shape[2:]) * max(H, W) // min(H, W)) < part.shape[axis]:
                part = part.narrow(axis, (part.shape[axis] - most) // 2, most)
        h, w = part.shape[2:]
        new, old = (high, h) if high * w >= wide * h else (wide, w)  # of the axis that has less to spare
        height, width = int(new * h / old), int(new * w / old)
        top, left = round((height - H) / 2), round((width - W) / 2)
        part = part if (h, w) == (height, width) else resize(part, (height, width))
        centres.append(part[:, :, top : top + H, left : left + W])
    return torch.cat(centres)


def area_resize(images: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, 3, h, w) uint8, boxes (B, 4) in pixels (top, left, height, width; fractions allowed) -> (B, 3, *size)
    uint8: each new pixel is the mean of what it covers. One box (4,): of all."""
    boxes = send(boxes.expand(len(images), 4).float(), images.device)
    (top, left, high, wide), (h, w) = boxes.unbind(1), images.shape[2:]
    down, across = _cover(top, high, h, size[0]), _cover(left, wide, w, size[1])
    pixels = down[:, None] @ images.float() @ across[:, None].transpose(2, 3)
    return pixels.round_().clamp_(0, 255).to(torch.uint8)


def _cover(start: Tensor, length: Tensor, old: int, new: int) -> Tensor:
    """(B,), (B,) -> (B, new, old): the share of each old pixel in each new one; rows sum to 1."""
    edges = start[:, None] + length[:, None] / new * torch.arange(new + 1, device=start.device)
    pixel = torch.arange(old, device=start.device)
    begins, ends = (edge[..., None] for edge in (edges[:, :-1], edges[:, 1:]))
    shared = torch.minimum(ends, pixel + 1) - torch.maximum(begins, pixel)
    return shared.clamp_(min=0) / (length[:, None, None] / new)


# --------------------------------------------------------------------------- boxes to crop, boxes to erase


def _shapes(key: str, seed: int, epoch: int, positions: Tensor, area, scale, ratio) -> tuple[Tensor, Tensor]:
    """Sides of boxes (B, TRIES): the product is even in `scale` of `area`, the log of their ratio in `ratio`."""
    tries = torch.arange(TRIES)[:, None], torch.arange(2)
    share, log = uniform(f"{key}/shape", seed, epoch, positions[:, None, None], *tries).unbind(2)
    share = scale[0] + (scale[1] - scale[0]) * share
    low, high = math.log(ratio[0]), math.log(ratio[1])
    area, ratio = area * share, (low + (high - low) * log).exp()
    return (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()


def _first(key: str, seed: int, epoch: int, positions: Tensor, fits, high, wide, height, width) -> Tensor:
    """The first box that fits (B, TRIES), at an even place in its image: (B, 4) top, left, height, width."""
    first = fits.int().argmax(dim=1, keepdim=True)
    high, wide = high.gather(1, first)[:, 0], wide.gather(1, first)[:, 0]
    down, across = uniform(f"{key}/place", seed, epoch, positions[:, None], torch.arange(2)).unbind(1)
    top, left = (down * (height - high + 1)).long(), (across * (width - wide + 1)).long()
    return torch.stack((top, left, high, wide), dim=1)


def crop_boxes(
    config: AugmentConfig, seed: int, epoch: int, positions: Tensor, heights: Tensor, widths: Tensor
) -> Tensor:
    """The random resized crop: (B,) each -> (B, 4) int64 top, left, height, width, in pixels.

    The distribution is torchvision's and timm's: the area is even in `crop_scale`, the logarithm of width /
    height in `crop_ratio`; after ten that do not fit, the largest centred part whose ratio is allowed.
    """
    where, (low, high) = ("crop", seed, epoch, positions), config.crop_ratio
    wide, tall = _shapes(*where, (heights * widths)[:, None], config.crop_scale, (low, high))
    fits = (0 < tall) & (tall <= heights[:, None]) & (0 < wide) & (wide <= widths[:, None])
    boxes = _first(*where, fits, tall, wide, heights, widths)
    tall = heights.clamp(max=(widths.double() / low).round().long().clamp(min=1))
    wide = widths.clamp(max=(heights.double() * high).round().long().clamp(min=1))
    whole = torch.stack(((heights - tall) // 2, (widths - wide) // 2, tall, wide), dim=1)
    boxes = torch.where(fits.any(dim=1, keepdim=True), boxes, whole)
    if config.crop_place == "centre":
        boxes[:, :2] = (torch.stack((heights, widths), dim=1) - boxes[:, 2:]) // 2
    return boxes


def erase_boxes(probability: float, seed: int, epoch: int, positions: Tensor, size: tuple) -> Tensor:
    """Random erasing: positions (B,) -> (B, 4) int64 top, left, height, width; all 0 where nothing is erased.

    timm's distribution: the share of the area is even in 0.02 to 1/3, the logarithm of height / width in that
    of 0.3 to 1/0.3; nothing is erased after ten boxes that are as high or as wide as the image.
    """
    chosen = uniform("erase", seed, epoch, positions) < probability
    where = "erase", seed, epoch, positions[chosen]
    tall, wide = _shapes(*where, size[0] * size[1], (0.02, 1 / 3), (0.3, 1 / 0.3))
    fits = (tall < size[0]) & (wide < size[1])
    boxes = torch.zeros(len(chosen), 4, dtype=torch.int64)
    boxes[chosen] = _first(*where, fits, tall, wide, *size) * fits.any(dim=1, keepdim=True)
    return boxes


# --------------------------------------------------------------------------- normalise, erase


def normalise(images: Tensor, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Tensor:
    """(B, 3, height, width) in [0, 1] -> the same, less the mean (ImageNet's), divided by the deviation."""
    values = (torch.tensor(v, dtype=images.dtype)[:, None, None] for v in (mean, std))
    mean, std = (send(value, images.device) for value in values)
    return (images - mean) / std


def renormalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(B, 3, height, width), normalised by ImageNet's -> the same, normalised by others."""
    if (tuple(mean), tuple(std)) == (MEAN, STD):
        return images
    own_mean, own_std = (images.new_tensor(v)[:, None, None] for v in (MEAN, STD))
    return normalise(images * own_std + own_mean, mean, std)


def _normalised(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 -> the same as `normalise(images.float() / 255)`."""
    if images.is_cuda:
        return _normalised_at_once(images, mean, std)
    # In a worker process this is memory that it shares with the main process: no batch is copied there.
    made = default_collate([torch.zeros((), dtype=torch.float32).expand(images.shape[1:])] * len(images))
    for old, new in zip(*(each.split(at_once(images)) for each in (images, made)), strict=True):
        new.copy_(old).div_(255).sub_(mean).div_(std)
    return made


@fused
def _normalised_at_once(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return images.float().div_(255).sub_(mean).div_(std)


def erase(images: Tensor, boxes: Tensor, seeds: Tensor) -> None:
    """Fills a box (B, 4) of each image (B, 3, H, W) float with N(0, 1) noise from its seed (B,), in place.

    Boxes and seeds are known on the CPU, so no GPU is asked; its noise is another one than the CPU's.
    """
    noise = torch.Generator(images.device)
    for image, (top, left, high, wide), seed in zip(images, boxes.tolist(), seeds.tolist(), strict=True):
        if high:
            image[:, top : top + high, left : left + wide].normal_(generator=noise.manual_seed(seed))


# --------------------------------------------------------------------------- mix
#
# Mixup and CutMix as timm has them. A group is to us what a process's batch is to timm: its images share one
# draw, and each is mixed with its mirror in the group, the first with the last. No group is cut in two, so
# the same draws give the same images for any number of processes and micro-batches.


class Mix(NamedTuple):
    """One draw a group, on the CPU."""

    share: Tensor  # (G,) float64: how much of an image is its own; the rest is its partner's
    cut: Tensor  # (G,) bool: CutMix, else mixup
    box: Tensor  # (G, 4) int64, pasted by CutMix: top, bottom, left, right


def draw_mix(config: AugmentConfig, seed: int, epoch: int, groups: Tensor, size: tuple[int, int]) -> Mix:
    """Numbers of groups in the epoch's stream (G,) -> their draws, for images of `size` (H, W)."""
    where = seed, epoch, groups
    cut = torch.full(groups.shape, bool(config.cutmix))
    if config.mixup and config.cutmix:
        cut = uniform("mix/which", *where) < config.mixup_switch_prob
    share = torch.ones(groups.shape, dtype=torch.float64)
    for alpha, mine in ((config.mixup, ~cut), (config.cutmix, cut)):
        if alpha:
            share = torch.where(mine, beta("mix/share", alpha, *where), share)
    # A square of 1 - share of the area about a random place, clipped at the borders: then less is pasted.
    sides = []
    for length, name in zip(size, ("row", "column"), strict=True):
        side = (length * (1 - share).sqrt()).long()
        middle = (length * uniform(f"mix/{name}", *where)).long()
        sides += [(middle - side // 2).clamp(0, length), (middle + (side + 1) // 2).clamp(0, length)]
    box = torch.stack(sides, dim=1)
    pasted = (box[:, 1] - box[:, 0]) * (box[:, 3] - box[:, 2])
    return Mix(torch.where(cut, 1 - pasted.double() / (size[0] * size[1]), share), cut, box)


def mix_images(images: Tensor, mix: Mix) -> Tensor:
    """(B, C, H, W) float -> the same shape, mixed within each group of B / G; on a CPU in place, pair by pair."""
    if images.is_cuda:
        return _mix(images, *(send(part, images.device) for part in mix))
    for group, share, cut, box in zip(images.unflatten(0, (len(mix.share), -1)), *mix, strict=True):
        own, other = share.to(images.dtype), (1 - share).to(images.dtype)
        top, bottom, left, right = box.tolist()
        for i in range(len(group) // 2):
            one, two = group[i], group[-1 - i]
            if cut:
                one, two = (image[:, top:bottom, left:right] for image in (one, two))
                mixed = two.clone()
                two.copy_(one)
            else:
                mixed = (one * own).add_(two * other)
                two.mul_(own).add_(one.mul_(other))
            one.copy_(mixed)
    return images


@fused
def _mix(images: Tensor, share: Tensor, cut: Tensor, box: Tensor) -> Tensor:
    row = torch.arange(images.shape[2], device=images.device)[:, None]
    column = torch.arange(images.shape[3], device=images.device)
    top, bottom, left, right = box[:, :, None, None].unbind(1)
    outside = (row < top) | (row >= bottom) | (column < left) | (column >= right)  # (G, H, W)
    own = torch.where(cut[:, None, None], outside.double(), share[:, None, None])
    # Both weights are rounded from double precision, as timm's are: one may not be 1 less the other.
    own, other = (weight.to(images.dtype)[:, None, None] for weight in (own, 1 - own))
    images = images.unflatten(0, (len(share), -1))
    return (images * own + images.flip(1) * other).flatten(0, 1)


def mix_labels(labels: Tensor, classes: int, smoothing: float, share: Tensor) -> Tensor:
    """(B,) int64 -> (B, K) float32: smoothed one-hot labels, mixed as the images are."""
    off = smoothing / classes
    own = torch.full((len(labels), classes), off, dtype=torch.float32, device=labels.device)
    own = own.scatter_(1, labels[:, None], 1 - smoothing + off).unflatten(0, (len(share), -1))
    share = send(share, labels.device)[:, None, None]
    return (own * share.float() + own.flip(1) * (1 - share).float()).flatten(0, 1)


def beta(key: str, alpha: float, *counters: int | Tensor) -> Tensor:
    """From the Beta distribution with both parameters `alpha`: float64, one draw for each of the counters."""
    seeds = bits(key, *counters)
    drawn = [numpy.random.default_rng(seed).beta(alpha, alpha) for seed in seeds.flatten().tolist()]
    return torch.tensor(drawn, dtype=torch.float64).view(seeds.shape)


@dataclass
class TrainTransform:
    """Training images -> what the model sees, and its targets.

    `label_smoothing` enters mixed labels only: where nothing is mixed, labels stay numbers, the loss smooths.
    """

    config: AugmentConfig
    size: int | Grid
    classes: int
    label_smoothing: float = 0.0
    seed: int = 0
    device: str | torch.device = "cpu"
    area: bool = False  # how images are resized, as in DataConfig.interpolation

    def __post_init__(self):
        self.size, self.device = pair(self.size), torch.device(self.device)
        self.notation = parse(self.config.randaugment) if self.config.randaugment else None
        kind = {"dtype": torch.float32, "device": self.device}
        self.mean, self.std = (torch.tensor(v, **kind)[:, None, None] for v in (MEAN, STD))

    def __call__(
        self, images: Sequence[Tensor] | Tensor, labels: Tensor, epoch: int, positions: Tensor, groups: Tensor
    ) -> tuple[Tensor, Tensor]:
        """B images (3, h, w) uint8 on the device, labels (B,) -> (B, 3, H, W) float32 there, and targets.

        positions  (B,) int64, CPU: of the images in the stream of the epoch
        groups     (G,) int64, CPU: numbers of the groups in that stream; image i is in group i // g
        targets    labels (B,) int64 or, where anything is mixed, (B, K) float32
        """
        config, where = self.config, (self.seed, epoch, positions)
        mixes = bool(config.mixup or config.cutmix)
        if mixes and len(images) != len(groups) * config.mix_group:
            raise ConfigError(f"{len(images)} images, {len(groups)} groups of mix_group={config.mix_group}")
        pixels = self._resize(images, uniform("flip", *where) < config.hflip, where)
        if self.notation:
            rand_augment(pixels, draw_policy(self.notation, *where))
        pixels, targets = _normalised(pixels, self.mean, self.std), send(labels, self.device)
        if config.random_erasing:
            boxes = erase_boxes(config.random_erasing, *where, self.size)
            erase(pixels, boxes, bits("erase/noise", *where))
        if mixes:
            mix = draw_mix(config, self.seed, epoch, groups, self.size)
            pixels = mix_images(pixels, mix)
            targets = mix_labels(targets, self.classes, self.label_smoothing, mix.share)
        return pixels, targets

    def _resize(self, images: Sequence[Tensor] | Tensor, flip: Tensor, where: tuple) -> Tensor:
        """A random part of each image, or its centre, at the size wanted: a new tensor (B, 3, H, W) uint8."""
        whole = torch.tensor([image.shape[1:] for image in images])
        boxes = crop_boxes(self.config, *where, *whole.T) if self.config.crop else F.pad(whole, (2, 0))
        if self.area:
            pixels = area_resize(images, boxes, self.size)
        elif self.config.crop:
            crops = zip(images, boxes.tolist(), strict=True)
            parts = (image[None, :, y : y + h, x : x + w] for image, (y, x, h, w) in crops)
            pixels = torch.cat([resize(part, self.size) for part in parts])
        else:
            pixels = centre_resize(images, self.size)
        mirrored = send(flip.nonzero()[:, 0], self.device)
        return pixels.index_copy_(0, mirrored, pixels.index_select(0, mirrored).flip(3)).contiguous()
