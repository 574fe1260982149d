"""Crops of images of any size, brought to one size by Pillow's antialiased filters, a batch at once on a GPU.

Letters: B images, h w height and width of one image, S sides of the result, in pixels. A box is (top, left,
height, width) in pixels of its image, fractions allowed.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy
import torch
from PIL import Image
from torch import Tensor

from cpvt.errors import DataError

SUPPORT = {"bicubic": 2.0, "bilinear": 1.0}  # of the filter, in pixels of the coarser grid
PILLOW = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def crop_resize(
    images: Sequence[Tensor] | Tensor,
    boxes: Tensor,
    size: tuple[int, int],
    flip: Tensor | None = None,
    bound: Literal["box", "image"] = "box",
    filter: Literal["bicubic", "bilinear"] = "bicubic",
) -> Tensor:
    """B images (3, h, w) uint8 or one (B, 3, h, w), boxes (B, 4) -> (B, 3, *size) uint8, where the images are.

    As Pillow did it until 12.2 and so the reference: the filter is widened where it shrinks the image; rows
    are filtered and rounded to uint8, then columns. Later Pillows take columns first where that is faster,
    which shows where bicubic overshoots black or white. Bicubic means Keys' a = -0.5.

    boxes   float64, kept on the CPU: the GPU's launches are planned from them
    flip    (B,) bool: mirror left and right
    bound   "box": the filter sees what lies in the box alone, crop first, then resize (training);
            "image": it may look beyond, `Image.resize(size, box=...)` (evaluation)

    On the CPU, Pillow computes it. On a GPU, Triton does, with float32 sums instead of 22-bit weights: at most
    one grey level apart. Raises DataError where a box is empty or not inside its image.
    """
    if filter not in SUPPORT or bound not in ("box", "image"):
        raise DataError(
            f"filter={filter!r}, bound={bound!r} were given: choose from {', '.join(SUPPORT)} and box, image"
        )
    boxes = torch.as_tensor(boxes, dtype=torch.float64, device="cpu")
    flip = torch.zeros(len(images), dtype=torch.bool) if flip is None else flip.cpu()
    _check(images, boxes, flip)
    if not len(images):
        device = images.device if isinstance(images, Tensor) else "cpu"
        return torch.empty(0, 3, *size, dtype=torch.uint8, device=device)
    if not images[0].is_cuda:
        way = by_pillow
    elif importlib.util.find_spec("triton"):
        way = by_triton
    else:
        way = by_matrices
    return way(images, boxes, size, flip, bound, filter)


def centre_box(
    height: int, width: int, image_size: int, crop_fraction: float = 0.875
) -> tuple[float, float, float, float]:
    """The box of an image that evaluation shows, for `crop_resize(..., (image_size, image_size), bound="image")`.

    The same as resizing the short side to floor(image_size / crop_fraction) and cutting out the centre, with
    torchvision's roundings of the long side and of the offset, but in one step.
    """
    if not 0 < crop_fraction <= 1:
        raise DataError(f"crop_fraction={crop_fraction} was given: give the share of the side, up to 1")
    short = math.floor(image_size / crop_fraction)
    if height <= width:
        rows, columns = short, int(short * width / height)
    else:
        rows, columns = int(short * height / width), short
    top, left = round((rows - image_size) / 2.0), round((columns - image_size) / 2.0)
    down, across = height / rows, width / columns  # pixels of the image for one of the resized
    # What rounding leaves beyond the border would be refused as outside.
    return top * down, left * across, min(image_size * down, height - top * down), min(
        image_size * across, width - left * across
    )  # fmt: skip


def _check(images, boxes: Tensor, flip: Tensor) -> None:
    if boxes.shape != (len(images), 4) or flip.shape != (len(images),):
        raise DataError(
            f"{len(images)} images, boxes {tuple(boxes.shape)} and flip {tuple(flip.shape)} were given: "
            f"give a box of four numbers and a flip an image"
        )
    sides = torch.tensor([image.shape[1:] for image in images], dtype=torch.float64).view(-1, 2)
    inside = (boxes[:, :2] >= 0) & (boxes[:, 2:] > 0) & (boxes[:, :2] + boxes[:, 2:] <= sides + 1e-6)
    if not inside.all():
        i = int((~inside.all(dim=1)).nonzero()[0])
        raise DataError(
            f"box {tuple(boxes[i].tolist())} was given for image {i} of {tuple(sides[i].int().tolist())} pixels: "
            f"give (top, left, height, width) inside it"
        )


@dataclass(frozen=True)
class Axis:
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


def plan(start: Tensor, length: Tensor, sides: Tensor, out: int, bound: str, filter: str) -> Axis:
    """Where the filter reads along one direction."""
    if bound == "box":
        low, high = start.floor(), torch.minimum((start + length - 1e-6).ceil(), sides)
    else:
        low, high = torch.zeros_like(sides), sides
    scale = length / out
    support = SUPPORT[filter] * scale.clamp(min=1)
    first = torch.maximum((start + scale / 2 - support + 0.5).floor(), low)
    last = torch.minimum((start + length - scale / 2 + support + 0.5).floor(), high)
    return Axis(start, scale, low, high, first, last)


def plans(images, boxes: Tensor, size: tuple[int, int], bound: str, filter: str) -> tuple[Axis, Axis]:
    """The plans of rows and of columns."""
    sides = torch.tensor([image.shape[1:] for image in images], dtype=torch.float64).view(-1, 2)
    down, across = (
        plan(boxes[:, axis], boxes[:, axis + 2], sides[:, axis], size[axis], bound, filter) for axis in (0, 1)
    )
    return down, across


# --------------------------------------------------------------------------- on the CPU


def by_pillow(images, boxes, size, flip, bound, filter) -> Tensor:
    """`crop_resize` by Pillow, image by image, in two calls: from 12.3 on one call may take columns first."""
    down, across = plans(images, boxes, size, bound, filter)
    (height, width), method = size, PILLOW[filter]
    out = torch.empty(len(images), 3, height, width, dtype=torch.uint8)
    for i, (image, box) in enumerate(zip(images, boxes.tolist(), strict=True)):
        top, bottom, left, right = (int(v[i]) for v in (down.first, down.last, across.low, across.high))
        pixels = Image.fromarray(image[:, top:bottom, left:right].permute(1, 2, 0).contiguous().numpy())
        x0, x1 = box[1] - left, min(box[1] + box[3], right) - left
        pixels = pixels.resize((width, bottom - top), method, box=(x0, 0, x1, bottom - top))
        y0, y1 = max(box[0] - top, 0.0), min(box[0] + box[2], bottom) - top
        pixels = pixels.resize((width, height), method, box=(0, y0, width, y1))
        if flip[i]:
            pixels = pixels.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        out[i] = torch.from_numpy(numpy.array(pixels)).permute(2, 0, 1)
    return out


# --------------------------------------------------------------------------- as two matrix products


def weights(axis: Axis, i: int, out: int, filter: str) -> Tensor:
    """(out, last - first): what each pixel read adds to each pixel of the result, for image i. Rows sum to 1."""
    start, scale, low, high, first, last = (
        float(v[i]) for v in (axis.start, axis.scale, axis.low, axis.high, axis.first, axis.last)
    )
    stretch = max(scale, 1.0)
    support = SUPPORT[filter] * stretch
    centre = start + (torch.arange(out, dtype=torch.float64) + 0.5) * scale
    pixel = torch.arange(first, last, dtype=torch.float64)
    seen = (pixel >= (centre - support + 0.5).floor().clamp(min=low)[:, None]) & (
        pixel < (centre + support + 0.5).floor().clamp(max=high)[:, None]
    )
    x = ((pixel + 0.5 - centre[:, None]) / stretch).abs()
    if filter == "bilinear":
        weight = (1 - x).clamp(min=0)
    else:
        weight = torch.where(x < 1, (1.5 * x - 2.5) * x**2 + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2) * (x < 2)
    weight = weight * seen
    return (weight / weight.sum(dim=1, keepdim=True)).float()


def by_matrices(images, boxes, size, flip, bound, filter) -> Tensor:
    """`crop_resize` as the definition reads, image by image, on any device: where a GPU has no Triton."""
    down, across = plans(images, boxes, size, bound, filter)
    out = torch.empty(len(images), 3, *size, dtype=torch.uint8, device=images[0].device)
    for i, image in enumerate(images):
        top, bottom, left, right = (int(v[i]) for v in (down.first, down.last, across.first, across.last))
        rows = weights(down, i, size[0], filter).to(image.device)
        columns = weights(across, i, size[1], filter).to(image.device)
        narrow = _round(image[:, top:bottom, left:right].float() @ columns.T)
        out[i] = _round(rows @ narrow)
    return torch.where(flip.to(out.device)[:, None, None, None], out.flip(-1), out)


def _round(pixels: Tensor) -> Tensor:
    return (pixels + 0.5).floor().clamp(0, 255)


# --------------------------------------------------------------------------- in two launches


def by_triton(images, boxes, size, flip, bound, filter) -> Tensor:
    """`crop_resize` for all images at once, on a GPU."""
    from cpvt.data.resize_triton import launch  # Triton comes with PyTorch for GPUs only

    rows, columns = plans(images, boxes, size, bound, filter)
    return launch(images, rows, columns, size, flip, filter == "bicubic")
