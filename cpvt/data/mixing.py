"""Mixup and CutMix on whole batches, inside groups of a fixed size: timm's semantics, one draw a group.

B batch, G groups of g images, H W rows and columns of pixels, K classes.

A group is to us what a process's batch is to timm: all its images share one draw, and each is mixed with its
mirror in the group, the first with the last. As groups never straddle a micro-batch, the same draws give the
same images for any number of processes and accumulation steps.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from cpvt.config import AugmentConfig
from cpvt.data.device import fused, send
from cpvt.rng import uniform


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


def mix_images(images: Tensor, mix: Mix, compile: bool = True) -> Tensor:
    """(B, C, H, W) float -> the same shape, mixed within each group of B / G. On a GPU compiled, if wanted."""
    return fused(_mix, compile, images, *(send(part, images.device) for part in mix))


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
    own = torch.full((len(labels), classes), off, device=labels.device)
    own = own.scatter_(1, labels[:, None], 1 - smoothing + off).unflatten(0, (len(share), -1))
    share = send(share, labels.device)[:, None, None]
    return (own * share.float() + own.flip(1) * (1 - share).float()).flatten(0, 1)


# --------------------------------------------------------------------------- the Beta distribution


def beta(key: str, alpha: float, *counters: int | Tensor) -> Tensor:
    """From the symmetric Beta distribution with both parameters `alpha`, float64.

    An even draw is sent through the inverse of the distribution function, read from a table (error below 1e-6).
    """
    even = uniform(key, *counters)
    share, power = torch.minimum(even, 1 - even), min(alpha, 1.0)
    lower = torch.as_tensor(numpy.interp(share.numpy(), *_distribution(alpha))) ** (1 / power)
    return torch.where(even < 0.5, lower, 1 - lower)


@functools.cache
def _distribution(alpha: float) -> tuple[numpy.ndarray, numpy.ndarray]:
    """The share of the distribution below x and x^min(alpha, 1), for x from 0 to 1/2; beyond is the mirror image.

    The density x^(alpha - 1) (1 - x)^(alpha - 1) may have a pole at 0; in steps of x^alpha there is none.
    """
    power = min(alpha, 1.0)
    s = numpy.linspace(0, 0.5**power, 2**18 + 1)
    x = ((s[1:] + s[:-1]) / 2) ** (1 / power)
    below = numpy.concatenate([[0.0], numpy.cumsum(x ** (alpha - power) * (1 - x) ** (alpha - 1))])
    return below / (2 * below[-1]), s
