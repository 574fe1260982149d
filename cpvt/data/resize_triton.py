"""`crop_resize` on a GPU: two launches for a batch of images of any sizes, read where they lie.

Letters: B images; h w height and width of one image; R rows of it that are read; H W sides of the result.

    images, each (3, h, w) -> filter along rows -> buffer, (3, R, W) an image -> along columns -> (B, 3, H, W)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 16, 64  # pixels of a program
# Places in the table: FIELDS int64 an image; from START_Y on they are float64 bit by bit.
FIELDS = tl.constexpr(16)
ADDRESS, HEIGHT, WIDTH = (tl.constexpr(i) for i in (0, 1, 2))  # of the image
ORIGIN_Y, ORIGIN_X = (tl.constexpr(i) for i in (3, 4))  # the box's first whole pixel
FIRST, COUNT = (tl.constexpr(i) for i in (5, 6))  # rows that are read
LOW, HIGH = (tl.constexpr(i) for i in (7, 8))  # columns that may be read
OFFSET, FLIP = (tl.constexpr(i) for i in (9, 10))  # of the image's part of the buffer; to mirror or not
START_Y, SCALE_Y, START_X, SCALE_X = (tl.constexpr(i) for i in (11, 12, 13, 14))  # from the origin


@triton.jit
def _weight(distance, BICUBIC: tl.constexpr):
    """The filter's value at a distance in pixels of the coarser grid."""
    x = tl.abs(distance)
    if BICUBIC:
        near = (1.5 * x - 2.5) * x * x + 1.0
        far = ((2.5 - 0.5 * x) * x - 4.0) * x + 2.0
        return tl.where(x < 1.0, near, tl.where(x < 2.0, far, 0.0))
    return tl.maximum(1.0 - x, 0.0)


@triton.jit
def _rounded(value):
    return tl.minimum(tl.maximum(tl.floor(value + 0.5), 0.0), 255.0).to(tl.uint8)


@triton.jit
def _number(table, row, place: tl.constexpr):
    return tl.load(table + row * FIELDS + place).to(tl.float64, bitcast=True).to(tl.float32)


@triton.jit
def across(table, work, buffer, W: tl.constexpr, BICUBIC: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """Rows of the images -> rows of the buffer, mirrored where asked. A program: R x C pixels of one image.

    work holds (image, first row) for each program along the first direction. Coordinates count from the
    box's first whole pixel, so that float32 is fine enough for them. Neighbouring threads read neighbouring
    pixels; told that the buffer is aligned, the compiler would give each thread eight, for the store's sake.
    """
    image = tl.load(work + 2 * tl.program_id(0))
    row = tl.load(work + 2 * tl.program_id(0) + 1).to(tl.int32) + tl.arange(0, R)
    column = tl.program_id(1) * C + tl.arange(0, C)
    entry = table + image * FIELDS
    address = tl.load(entry + ADDRESS).to(tl.pointer_type(tl.uint8))
    height, width = tl.load(entry + HEIGHT), tl.load(entry + WIDTH)
    origin, first_row, rows = tl.load(entry + ORIGIN_X), tl.load(entry + FIRST), tl.load(entry + COUNT)
    low, high = (tl.load(entry + LOW) - origin).to(tl.int32), (tl.load(entry + HIGH) - origin).to(tl.int32)
    start, scale = _number(table, image, START_X), _number(table, image, SCALE_X)

    stretch = tl.maximum(scale, 1.0)
    support = stretch * 2.0 if BICUBIC else stretch
    mirrored = tl.where(tl.load(entry + FLIP) != 0, W - 1 - column, column)
    centre = start + (mirrored.to(tl.float32) + 0.5) * scale
    first = tl.maximum(tl.floor(centre - support + 0.5).to(tl.int32), low)
    last = tl.minimum(tl.floor(centre + support + 0.5).to(tl.int32), high)
    taps = tl.floor(2.0 * support).to(tl.int32) + 2
    inside = (row < rows)[:, None] & (column < W)[None, :]
    line = address + (first_row + row)[:, None] * width + origin
    plane = height * width

    total = tl.zeros((C,), tl.float32)
    red = tl.zeros((R, C), tl.float32)
    green = tl.zeros((R, C), tl.float32)
    blue = tl.zeros((R, C), tl.float32)
    for tap in range(0, taps):
        pixel = first + tap
        seen = pixel < last
        weight = tl.where(seen, _weight((pixel.to(tl.float32) + 0.5 - centre) / stretch, BICUBIC), 0.0)
        total += weight
        source = line + pixel[None, :]
        mask = inside & seen[None, :]
        red += weight[None, :] * tl.load(source, mask, 0).to(tl.float32)
        green += weight[None, :] * tl.load(source + plane, mask, 0).to(tl.float32)
        blue += weight[None, :] * tl.load(source + 2 * plane, mask, 0).to(tl.float32)

    share = 1.0 / total[None, :]
    target = buffer + tl.load(entry + OFFSET) + row[:, None] * W + column[None, :]
    tl.store(target, _rounded(red * share), inside)
    tl.store(target + rows * W, _rounded(green * share), inside)
    tl.store(target + 2 * rows * W, _rounded(blue * share), inside)


@triton.jit
def down(
    table,
    buffer,
    out,
    H: tl.constexpr,
    W: tl.constexpr,
    BICUBIC: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """Columns of the buffer -> the result. A program: R x C pixels of one image."""
    image = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * R + tl.arange(0, R)
    column = tl.program_id(2) * C + tl.arange(0, C)
    entry = table + image * FIELDS
    origin, rows = tl.load(entry + ORIGIN_Y), tl.load(entry + COUNT)
    low = (tl.load(entry + FIRST) - origin).to(tl.int32)  # the first row of the buffer
    high = low + rows.to(tl.int32)
    start, scale = _number(table, image, START_Y), _number(table, image, SCALE_Y)

    stretch = tl.maximum(scale, 1.0)
    support = stretch * 2.0 if BICUBIC else stretch
    centre = start + (row.to(tl.float32) + 0.5) * scale
    first = tl.maximum(tl.floor(centre - support + 0.5).to(tl.int32), low)
    last = tl.minimum(tl.floor(centre + support + 0.5).to(tl.int32), high)
    taps = tl.floor(2.0 * support).to(tl.int32) + 2
    inside = (row < H)[:, None] & (column < W)[None, :]
    base = buffer + tl.multiple_of(tl.load(entry + OFFSET), 16) + column[None, :]
    plane = rows * W

    total = tl.zeros((R,), tl.float32)
    red = tl.zeros((R, C), tl.float32)
    green = tl.zeros((R, C), tl.float32)
    blue = tl.zeros((R, C), tl.float32)
    for tap in range(0, taps):
        pixel = first + tap
        seen = pixel < last
        weight = tl.where(seen, _weight((pixel.to(tl.float32) + 0.5 - centre) / stretch, BICUBIC), 0.0)
        total += weight
        source = base + (pixel - low)[:, None].to(tl.int64) * W
        mask = inside & seen[:, None]
        red += weight[:, None] * tl.load(source, mask, 0).to(tl.float32)
        green += weight[:, None] * tl.load(source + plane, mask, 0).to(tl.float32)
        blue += weight[:, None] * tl.load(source + 2 * plane, mask, 0).to(tl.float32)

    share = 1.0 / total[:, None]
    target = out + image * (3 * H * W) + row[:, None] * W + column[None, :]
    tl.store(target, _rounded(red * share), inside)
    tl.store(target + H * W, _rounded(green * share), inside)
    tl.store(target + 2 * H * W, _rounded(blue * share), inside)


def launch(images, rows, columns, size: tuple[int, int], flip: Tensor, bicubic: bool) -> Tensor:
    """Images (3, h, w), the plans of their rows and columns -> (B, 3, *size), on the current stream.

    Nothing waits for the GPU.
    """
    device = images[0].device
    images = [image.contiguous() for image in images]  # planes apart; a decoder's images already are
    table, work, length = _tables(images, rows, columns, size, flip)
    packed = torch.cat([table.flatten(), work.flatten()])
    if device.type == "cuda":
        packed = packed.pin_memory().to(device, non_blocking=True)
    work = packed[table.numel() :]
    buffer = torch.empty(length, dtype=torch.uint8, device=device)
    out = torch.empty(len(images), 3, *size, dtype=torch.uint8, device=device)
    (height, width), blocks = size, triton.cdiv(size[1], COLUMNS)
    with torch.cuda.device_of(out):
        across[(len(work) // 2, blocks)](packed, work, buffer, width, bicubic, ROWS, COLUMNS)
        grid = len(images), triton.cdiv(height, ROWS), blocks
        down[grid](packed, buffer, out, height, width, bicubic, ROWS, COLUMNS)
    return out


def _tables(images, rows, columns, size, flip) -> tuple[Tensor, Tensor, int]:
    """What the kernels have to know: (B, FIELDS) int64, (programs, 2) int64, and the buffer's length in bytes."""
    count = (rows.last - rows.first).long()
    # Each image's part of the buffer begins at a multiple of 16, for aligned loads.
    lengths = (3 * size[1] * count + 15) // 16 * 16
    origins = rows.start.floor(), columns.start.floor()
    numbers = {
        ADDRESS: [image.data_ptr() for image in images],
        HEIGHT: [image.shape[1] for image in images],
        WIDTH: [image.shape[2] for image in images],
        ORIGIN_Y: origins[0],
        ORIGIN_X: origins[1],
        FIRST: rows.first,
        COUNT: count,
        LOW: columns.low,
        HIGH: columns.high,
        OFFSET: lengths.cumsum(0) - lengths,
        FLIP: flip,
        START_Y: (rows.start - origins[0]).view(torch.int64),
        SCALE_Y: rows.scale.view(torch.int64),
        START_X: (columns.start - origins[1]).view(torch.int64),
        SCALE_X: columns.scale.view(torch.int64),
    }
    table = torch.zeros(len(images), FIELDS.value, dtype=torch.int64)
    for place, values in numbers.items():
        table[:, place.value] = torch.as_tensor(values)
    blocks = (count + ROWS - 1) // ROWS
    image = torch.arange(len(images)).repeat_interleave(blocks)
    block = torch.arange(len(image)) - (blocks.cumsum(0) - blocks).repeat_interleave(blocks)
    return table, torch.stack([image, block * ROWS], dim=1), int(lengths.sum())
