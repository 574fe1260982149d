"""Crops of images of any size, brought to one size by Pillow's antialiased bicubic filter, a batch at once on
a GPU.

Letters: B images, h w height and width of one image, S sides of the result, in pixels. A box is (top, left,
height, width) in pixels of its image, fractions allowed.
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

SUPPORT = 2.0  # of the filter to each side, in pixels of the coarser grid


def crop_resize(
    images: Sequence[Tensor] | Tensor,
    boxes: Tensor,
    size: tuple[int, int],
    flip: Tensor | None = None,
    bound: Literal["box", "image"] = "box",
) -> Tensor:
    """B images (3, h, w) uint8 or one (B, 3, h, w), boxes (B, 4) -> (B, 3, *size) uint8, where the images
    are.

    As Pillow did it until 12.2 and so the reference: the filter is widened where it shrinks the image; rows
    are filtered and rounded to uint8, then columns. Later Pillows take columns first where that is faster,
    which shows where the filter overshoots black or white. (Keys' cubic with a = -0.5.)

    boxes   float64, kept on the CPU: the GPU's launches are planned from them
    flip    (B,) bool: mirror left and right
    bound   "box": the filter sees what lies in the box alone, crop first, then resize (training);
            "image": it may look beyond, `Image.resize(size, box=...)` (evaluation)

    On the CPU, Pillow computes it. On a GPU, Triton does, with float32 sums instead of 22-bit weights: at
    most one grey level apart. Raises DataError where a box is empty or not inside its image.
    """
    boxes = torch.as_tensor(boxes, dtype=torch.float64, device="cpu")
    flip = torch.zeros(len(images), dtype=torch.bool) if flip is None else flip.cpu()
    sides = torch.tensor([image.shape[1:] for image in images], dtype=torch.float64).view(-1, 2)
    inside = (boxes[:, :2] >= 0) & (boxes[:, 2:] > 0) & (boxes[:, :2] + boxes[:, 2:] <= sides + 1e-6)
    if not inside.all():
        i = int((~inside.all(dim=1)).nonzero()[0])
        raise DataError(
            f"box {tuple(boxes[i].tolist())} was given for image {i} of {tuple(sides[i].int().tolist())} "
            "pixels: give (top, left, height, width) inside it"
        )
    if not len(images):
        return torch.empty(0, 3, *size, dtype=torch.uint8)
    down, across = plans(images, boxes, size, bound)
    if not images[0].is_cuda:
        return by_pillow(images, boxes, down, across, size, flip)
    from cpvt.data.resize_triton import by_triton  # Triton comes with PyTorch for GPUs only

    return by_triton(images, down, across, size, flip)


def centre_box(height: int, width: int, image_size: int, crop_pct: float = 0.875) -> tuple[float, ...]:
    """The box of an image that evaluation shows, for `crop_resize(..., (image_size, image_size),
    bound="image")`.

    The same as resizing the short side to floor(image_size / crop_pct) and cutting out the centre, with
    torchvision's roundings of the long side and of the offset, but in one step.
    """
    if not 0 < crop_pct <= 1:
        raise DataError(f"crop_pct={crop_pct} was given: give the share of the side, up to 1")
    short = math.floor(image_size / crop_pct)
    if height <= width:
        rows, columns = short, int(short * width / height)
    else:
        rows, columns = int(short * height / width), short
    top, left = round((rows - image_size) / 2.0), round((columns - image_size) / 2.0)
    down, across = height / rows, width / columns  # pixels of the image for one of the resized
    top, left, high, wide = top * down, left * across, image_size * down, image_size * across
    return (
        top,
        left,
        min(high, height - top),
        min(wide, width - left),
    )  # rounding may leave a bit beyond the border


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


def plans(images, boxes: Tensor, size: tuple[int, int], bound: str) -> list[Axis]:
    """Where the filter reads: along the columns, from top to bottom, and along the rows."""
    found = []
    for axis, out in enumerate(size):
        start, length = boxes[:, axis], boxes[:, axis + 2]
        side = torch.tensor([image.shape[axis + 1] for image in images], dtype=torch.float64)
        low, high = torch.zeros_like(side), side
        if bound == "box":
            low, high = start.floor(), torch.minimum((start + length - 1e-6).ceil(), side)
        scale = length / out
        support = SUPPORT * scale.clamp(min=1)
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
