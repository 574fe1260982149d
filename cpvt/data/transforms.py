"""What is done to the images of a training batch: the recipe, on whole batches, on the device they lie on.

Crop and resize, flip, RandAugment, normalise, erase, mix: in this order. Up to the RandAugment the pixels are
uint8 between the steps, as in timm, then float32.

Every draw is a function of (seed, epoch, position), and of (seed, epoch, group) where a group of images shares
it, and is made on the CPU. So an image meets the same fate in whatever micro-batch, process or worker it is.

Letters: B images, S sides of what the model sees, K classes, G groups that are mixed among each other.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from cpvt.config import AugmentConfig
from cpvt.data.device import fused, send
from cpvt.data.mixing import Mix, draw_mix, mix_images, mix_labels
from cpvt.data.randaugment import Policy, RandAugment
from cpvt.data.resize import centre_box, crop_resize
from cpvt.errors import ConfigError
from cpvt.rng import bits, mix, uniform

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, the field's convention
TRIES = 10  # places drawn for a crop or for a box to erase, of which the first that fits is taken


class Draws(NamedTuple):
    """All that chance decides about a batch. On the CPU; None where a step is off."""

    crop: Tensor | None  # (B, 4) int64: top, left, height, width
    flip: Tensor  # (B,) bool
    policy: Policy | None
    erase: Tensor | None  # (B, 4) int64: top, left, height, width; 0 high where nothing is erased
    noise: Tensor | None  # (B,) int64: where the counting of each image's noise starts
    mix: Mix | None


class Recipe:
    """Training images -> what the model sees, and its targets.

    `smoothing` enters mixed labels only: where nothing is mixed, the labels stay numbers and the loss smooths.
    `compile` allows torch.compile on a GPU. Raises ConfigError for a RandAugment text that cannot be read.
    """

    def __init__(
        self,
        config: AugmentConfig,
        image_size: int | tuple[int, int],
        num_classes: int,
        smoothing: float,
        seed: int,
        compile: bool = True,
    ):
        self.config, self.num_classes, self.smoothing, self.seed = config, num_classes, smoothing, seed
        self.size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        self.mixes = bool(config.mixup or config.cutmix)
        fill = tuple(round(255 * level) for level in MEAN)
        self.randaugment = (
            RandAugment(config.randaugment, fill, seed, compile) if config.randaugment else None
        )
        self.compile = compile

    def draw(self, epoch: int, positions: Tensor, groups: Tensor, heights: Tensor, widths: Tensor) -> Draws:
        """For images of these heights and widths at these positions in the epoch, (B,) each; groups (G,)."""
        config, where = self.config, (self.seed, epoch, positions)
        return Draws(
            crop_boxes(config, *where, heights, widths) if config.crop else None,
            uniform("flip", *where) < config.flip,
            self.randaugment.draw(epoch, positions) if self.randaugment else None,
            erase_boxes(config.erase, *where, self.size) if config.erase else None,
            bits("erase/noise", *where) if config.erase else None,
            draw_mix(config, self.seed, epoch, groups, self.size) if self.mixes else None,
        )

    def __call__(
        self,
        images: Sequence[Tensor] | Tensor,
        labels: Tensor,
        epoch: int,
        positions: Tensor,
        groups: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """B images (3, h, w) uint8, labels (B,) -> (B, 3, S, S) float32 on the images' device, and targets.

        positions  (B,) int64, CPU: of the images in the stream of the epoch
        groups     (G,) int64, CPU: numbers of the groups in that stream; image i is in group i // mix_group
        targets    labels (B,) int64 or, where anything is mixed, (B, K) float32

        Raises ConfigError where B is not G whole groups.
        """
        count, group = len(images), self.config.mix_group
        if self.mixes and count != len(groups) * group:
            raise ConfigError(
                f"{count} images and {len(groups)} groups with augment.mix_group={group}; expected "
                f"{group} images a group: choose a batch, a share of a process and a micro-batch of whole groups"
            )
        sides = torch.tensor([image.shape[1:] for image in images]).view(-1, 2)
        draws = self.draw(epoch, positions, groups, *sides.T)
        images = self._resize(images, sides, draws)
        if draws.policy:
            self.randaugment(images, draws.policy)
        images = fused(_normalised, self.compile, images, _statistics(images.device))
        labels = send(labels, images.device)
        if draws.erase is not None:
            erase(images, draws.erase, draws.noise)
        if draws.mix:
            images = mix_images(images, draws.mix, self.compile)
            labels = mix_labels(labels, self.num_classes, self.smoothing, draws.mix.share)
        return images, labels

    def _resize(self, images: Sequence[Tensor] | Tensor, sides: Tensor, draws: Draws) -> Tensor:
        """The drawn part of each image, or its centre, at the size wanted: a new tensor (B, 3, S, S) uint8."""
        if draws.crop is not None:
            return crop_resize(images, draws.crop.double(), self.size, draws.flip)
        if isinstance(images, Tensor) and images.shape[2:] == self.size:
            return torch.where(send(draws.flip, images.device)[:, None, None, None], images.flip(3), images)
        boxes = [_middle(height, width, self.size) for height, width in sides.tolist()]
        return crop_resize(images, torch.tensor(boxes, dtype=torch.float64), self.size, draws.flip, "image")


def _middle(height: int, width: int, size: tuple[int, int]) -> tuple[float, float, float, float]:
    if size[0] == size[1]:
        return centre_box(height, width, size[0], 1.0)
    scale = min(height / size[0], width / size[1])
    down, across = scale * size[0], scale * size[1]
    return (height - down) / 2, (width - across) / 2, down, across


def normalise(images: Tensor) -> Tensor:
    """(B, 3, height, width) in [0, 1] -> the same with ImageNet's mean taken off and deviation divided out."""
    mean, std = (images.new_tensor(v)[:, None, None] for v in (MEAN, STD))
    return (images - mean) / std


def _normalised(images: Tensor, statistics: Tensor) -> Tensor:
    """uint8 -> the same as `normalise(images.float() / 255)`, in place after the first step."""
    return images.float().div_(255).sub_(statistics[0]).div_(statistics[1])


@functools.cache
def _statistics(device: torch.device) -> Tensor:
    """Mean and deviation, (2, 3, 1, 1) float32: sent to a GPU once, as sending waits for it."""
    return torch.tensor([MEAN, STD])[:, :, None, None].to(device)


# --------------------------------------------------------------------------- where to crop


def crop_boxes(
    config: AugmentConfig, seed: int, epoch: int, positions: Tensor, heights: Tensor, widths: Tensor
) -> Tensor:
    """The random resized crop: (B,) each -> (B, 4) int64 top, left, height, width, in pixels.

    The distribution is torchvision's and timm's: the area is even in `crop_scale`, the logarithm of width /
    height in `crop_ratio`; after ten that do not fit, the largest centred part whose ratio is allowed.
    """
    area, ratio = _tries("crop", seed, epoch, positions)
    area = (heights * widths)[:, None] * _between(area, *config.crop_scale)
    ratio = _between(ratio, *(math.log(r) for r in config.crop_ratio)).exp()
    high, wide = (area / ratio).sqrt().round().long(), (area * ratio).sqrt().round().long()
    fits = (0 < high) & (high <= heights[:, None]) & (0 < wide) & (wide <= widths[:, None])
    boxes = _place("crop", seed, epoch, positions, _first(fits, high), _first(fits, wide), heights, widths)

    high = heights.clamp(max=(widths.double() / config.crop_ratio[0]).round().long())
    wide = widths.clamp(max=(heights.double() * config.crop_ratio[1]).round().long())
    whole = torch.stack(((heights - high) // 2, (widths - wide) // 2, high, wide), dim=1)
    return torch.where(fits.any(dim=1, keepdim=True), boxes, whole)


def erase_boxes(
    probability: float, seed: int, epoch: int, positions: Tensor, size: tuple[int, int]
) -> Tensor:
    """Random erasing: positions (B,) -> (B, 4) int64 top, left, height, width; all 0 where nothing is erased.

    timm's distribution: the share of the area is even in 0.02 to 1/3, the logarithm of height / width in that
    of 0.3 to 1/0.3; nothing is erased after ten boxes that are as high or as wide as the image.
    """
    chosen = uniform("erase", seed, epoch, positions) < probability
    positions = positions[chosen]
    share, ratio = _tries("erase", seed, epoch, positions)
    area = size[0] * size[1] * _between(share, 0.02, 1 / 3)
    ratio = _between(ratio, math.log(0.3), -math.log(0.3)).exp()
    high, wide = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
    fits = (high < size[0]) & (wide < size[1])
    found = _place("erase", seed, epoch, positions, _first(fits, high), _first(fits, wide), *size)
    boxes = torch.zeros(len(chosen), 4, dtype=torch.int64)
    boxes[chosen] = found * fits.any(dim=1, keepdim=True)
    return boxes


def _tries(key: str, seed: int, epoch: int, positions: Tensor) -> tuple[Tensor, ...]:
    """Two even draws a try: (B, TRIES) each."""
    tries = torch.arange(TRIES)[:, None], torch.arange(2)
    return uniform(f"{key}/shape", seed, epoch, positions[:, None, None], *tries).unbind(2)


def _between(even: Tensor, low: float, high: float) -> Tensor:
    return low + (high - low) * even


def _first(fits: Tensor, values: Tensor) -> Tensor:
    """Of the tries (B, TRIES), the value of the first that fits, (B,); of the first where none does."""
    return values.gather(1, fits.int().argmax(dim=1, keepdim=True))[:, 0]


def _place(
    key: str, seed: int, epoch: int, positions: Tensor, high: Tensor, wide: Tensor, height, width
) -> Tensor:
    """Boxes of these sides, (B,), at even places inside images of height x width: (B, 4)."""
    down, across = uniform(f"{key}/place", seed, epoch, positions[:, None], torch.arange(2)).unbind(1)
    top, left = (down * (height - high + 1)).long(), (across * (width - wide + 1)).long()
    return torch.stack((top, left, high, wide), dim=1)


# --------------------------------------------------------------------------- noise


def erase(images: Tensor, boxes: Tensor, start: Tensor) -> None:
    """Fills a box of each image (B, 3, H, W) float with N(0, 1) noise, in place. boxes (B, 4), start (B,): CPU.

    A hash a pixel gives its three values: 16 bits each choose among as many quantiles of the distribution, so
    the same noise comes on every device. How many pixels are erased is known on the CPU: no GPU is asked.
    """
    image = boxes[:, 2:].prod(dim=1).nonzero()[:, 0]
    top, left, high, wide = boxes[image].T
    area = high * wide
    total, device = int(area.sum()), images.device
    if not total:
        return
    facts = send(torch.stack((image, top, left, wide, area.cumsum(0) - area, start[image])), device)
    box = torch.arange(len(image), device=device).repeat_interleave(send(area, device), output_size=total)
    image, top, left, wide, before, start = facts[:, box]
    pixel = torch.arange(total, device=device) - before  # counted along the rows of its box
    noise = mix(start + pixel)[:, None] >> torch.arange(0, 48, 16, device=device) & (2**16 - 1)
    row, column = top + pixel // wide, left + pixel % wide
    channels = torch.arange(3, device=device)
    images[image[:, None], channels, row[:, None], column[:, None]] = _quantiles(device)[noise].to(
        images.dtype
    )


@functools.cache
def _quantiles(device: torch.device) -> Tensor:
    """(2^16,) float32: the middles of as many equal shares of the standard normal distribution."""
    normal = NormalDist()
    return torch.tensor([normal.inv_cdf((i + 0.5) / 2**16) for i in range(2**16)]).to(device)
