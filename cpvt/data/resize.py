"""Crops of images of any size, brought to one size by Pillow's antialiased bicubic filter.

Letters: B images, h w height and width of one image, in pixels. A box is (top, left, height, width) in pixels of
its image, fractions allowed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy
import torch
from PIL import Image
from torch import Tensor

from cpvt.errors import DataError


def crop_resize(
    images: Sequence[Tensor] | Tensor,
    boxes: Tensor,
    size: tuple[int, int],
    flip: Tensor | None = None,
    bound: Literal["box", "image"] = "box",
) -> Tensor:
    """B images (3, h, w) uint8 or one (B, 3, h, w), boxes (B, 4) -> (B, 3, *size) uint8, where the images are.

    As Pillow did it until 12.2 and so the reference: the filter (Keys' cubic with a = -0.5) is widened where it
    shrinks the image; rows are filtered and rounded to uint8, then columns. Later Pillows take columns first
    where that is faster, which shows where the filter overshoots black or white.

    boxes   on the CPU: a GPU's launches are planned from them
    flip    (B,) bool: mirror left and right
    bound   "box": the filter sees what lies in the box alone, crop first, then resize (training);
            "image": it may look beyond, `Image.resize(size, box=...)` (evaluation)

    On the CPU, Pillow computes it. On a GPU, Triton does, with float32 sums instead of 22-bit weights: at
    most one grey level apart. Raises DataError where a box is empty or not inside its image.
    """
    boxes, flip = boxes.double(), torch.zeros(len(images), dtype=torch.bool) if flip is None else flip
    sides = torch.tensor([image.shape[1:] for image in images], dtype=torch.float64)
    inside = (boxes[:, :2] >= 0) & (boxes[:, 2:] > 0) & (boxes[:, :2] + boxes[:, 2:] <= sides + 1e-6)
    for i in (~inside.all(dim=1)).nonzero()[:, 0].tolist():
        box, given = tuple(boxes[i].tolist()), tuple(images[i].shape[1:])
        raise DataError(
            f"box {box} of image {i} of {given} pixels: give (top, left, height, width) inside it"
        )
    down, across = plans(sides, boxes, size, bound)
    if not images[0].is_cuda:
        return by_pillow(images, boxes, down, across, size, flip)
    from cpvt.data.resize_triton import by_triton  # Triton comes with PyTorch for GPUs only

    return by_triton(images, down, across, size, flip)


def centre_box(height: int, width: int, image_size: int, crop_pct: float = 0.875) -> tuple[float, ...]:
    """The box that evaluation shows of an image, for `crop_resize(..., bound="image")`, in pixels.

    The same as resizing the short side to floor(image_size / crop_pct) and cutting out the centre, with
    torchvision's roundings of the long side and of the offset, but in one step.
    """
    short = math.floor(image_size / crop_pct)
    rows, columns = (int(short * side / min(height, width)) for side in (height, width))
    top, left = round((rows - image_size) / 2.0), round((columns - image_size) / 2.0)
    down, across = height / rows, width / columns  # pixels of the image for one of the resized
    top, left, high, wide = top * down, left * across, image_size * down, image_size * across
    return top, left, min(high, height - top), min(wide, width - left)  # rounding may go beyond the border


def centre_resize(
    images: Sequence[Tensor] | Tensor, side: int, crop_pct: float = 1.0, flip: Tensor | None = None
) -> Tensor:
    """The centres of B images (3, h, w) uint8 -> (B, 3, side, side): see `centre_box`."""
    boxes = [centre_box(*image.shape[1:], side, crop_pct) for image in images]
    return crop_resize(images, torch.tensor(boxes, dtype=torch.float64), (side, side), flip, "image")


class Axis(NamedTuple):
    """One direction of the boxes of a batch, (B,) float64 each, in pixels of the images.

    start, scale  where the box begins; its pixels for one of the result
    low, high     the filter sees pixels low ... high - 1
    first, last   ... and of these it reads first ... last - 1
    """

    start: Tensor
    scale: Tensor
    low: Tensor
    high: Tensor
    first: Tensor
    last: Tensor


def plans(sides: Tensor, boxes: Tensor, size: tuple[int, int], bound: str) -> list[Axis]:
    """Where the filter reads in images of `sides` (B, 2): from top to bottom, and from left to right."""
    found = []
    for side, start, length, out in zip(sides.T, boxes[:, :2].T, boxes[:, 2:].T, size, strict=True):
        low, high = torch.zeros_like(side), side
        if bound == "box":
            low, high = start.floor(), torch.minimum((start + length - 1e-6).ceil(), side)
        scale = length / out
        support = 2 * scale.clamp(min=1)  # two pixels of the coarser grid to each side
        first = torch.maximum((start + scale / 2 - support + 0.5).floor(), low)
        last = torch.minimum((start + length - scale / 2 + support + 0.5).floor(), high)
        found.append(Axis(start, scale, low, high, first, last))
    return found


def by_pillow(images, boxes: Tensor, down: Axis, across: Axis, size: tuple[int, int], flip: Tensor) -> Tensor:
    """Image by image, in two calls: from 12.3 on one call may take columns first."""
    height, width = size
    out = torch.empty(len(images), 3, height, width, dtype=torch.uint8)
    for i, (image, box) in enumerate(zip(images, boxes.tolist(), strict=True)):
        top, bottom, left, right = (int(v[i]) for v in (down.first, down.last, across.low, across.high))
        pixels = Image.fromarray(image[:, top:bottom, left:right].permute(1, 2, 0).contiguous().numpy())
        x0, x1 = box[1] - left, min(box[1] + box[3], right) - left
        pixels = pixels.resize((width, bottom - top), Image.Resampling.BICUBIC, (x0, 0, x1, bottom - top))
        y0, y1 = max(box[0] - top, 0.0), min(box[0] + box[2], bottom) - top
        pixels = pixels.resize((width, height), Image.Resampling.BICUBIC, (0, y0, width, y1))
        if flip[i]:
            pixels = pixels.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        out[i] = torch.from_numpy(numpy.array(pixels)).permute(2, 0, 1)
    return out
