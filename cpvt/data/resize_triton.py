"""`crop_resize` on a GPU: two launches for a batch of images of any sizes, read where they lie.

    images, each (3, h, w) -> filter along rows -> buffer, (3, R, W) an image -> along columns -> (B, 3, H, W)

Letters: B images; h w height and width of one image; R rows of it that are read; H W sides of the result.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cpvt.data.randaugment import send
from cpvt.data.resize import Axis

ROWS, COLUMNS = 16, 64  # pixels of a program, which are also lines of the other launch
# An image's entry in a table, int64 each: address of the first pixel that is read, pixels from row to row and from
# colour to colour, R, where its part of the buffer begins, whether it is mirrored; then, of one direction and from
# the box's first whole pixel, what `Axis` says. START and SCALE are float64 bit by bit.
ADDRESS, PITCH, PLANE, READ, OFFSET, FLIP, LOW, HIGH, START, SCALE = map(tl.constexpr, range(10))
FIELDS = tl.constexpr(10)


@triton.jit
def _float(place):
    return tl.load(place).to(tl.float64, bitcast=True).to(tl.float32)


@triton.jit
def _cubic(x):
    """Keys' cubic with a = -0.5, x pixels of the coarser grid away."""
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = ((2.5 - 0.5 * x) * x - 4.0) * x + 2.0
    return tl.where(x < 1.0, near, tl.where(x < 2.0, far, 0.0))


@triton.jit
def _rounded(value):
    return tl.minimum(tl.maximum(tl.floor(value + 0.5), 0.0), 255.0).to(tl.uint8)


@triton.jit
def resample(
    table, work, buffer, out,
    ALONG_ROWS: tl.constexpr, H: tl.constexpr, W: tl.constexpr, L: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """One direction: a program makes P pixels along each of L lines of an image, in three colours.

    Along rows, a line is a row, from the image to the buffer, mirrored where asked; along columns, a column,
    from the buffer to the result. `work` holds (image, first line) for each program.
    """
    image = tl.load(work + 2 * tl.program_id(0))
    line = tl.multiple_of(tl.load(work + 2 * tl.program_id(0) + 1).to(tl.int32), L) + tl.arange(0, L)
    place = tl.program_id(1) * P + tl.arange(0, P)
    entry = table + image * FIELDS
    read, offset = tl.load(entry + READ), tl.load(entry + OFFSET)
    if ALONG_ROWS:
        inside = (line < read)[:, None] & (place < W)[None, :]
        address = tl.load(entry + ADDRESS).to(tl.pointer_type(tl.uint8))
        source, plane = address + line[:, None] * tl.load(entry + PITCH), tl.load(entry + PLANE)
        # Told that the offset is a multiple of 16, the compiler would store eight pixels at once and so let
        # each thread read eight: neighbouring threads had better read neighbours.
        target, out_plane = buffer + offset + line[:, None] * W + place[None, :], read * W
        place = tl.where(tl.load(entry + FLIP) != 0, W - 1 - place, place)
    else:
        inside = (line < W)[:, None] & (place < H)[None, :]
        source, plane = buffer + tl.multiple_of(offset, 16) + line[:, None], read * W
        target, out_plane = out + image * (3 * H * W) + place[None, :] * W + line[:, None], H * W

    scale = _float(entry + SCALE)
    stretch = tl.maximum(scale, 1.0)  # the filter reaches two pixels of the coarser grid to each side
    centre = _float(entry + START) + (place.to(tl.float32) + 0.5) * scale
    low = tl.load(entry + LOW).to(tl.int32)
    first = tl.maximum(tl.floor(centre - 2.0 * stretch + 0.5).to(tl.int32), low)
    high = tl.load(entry + HIGH).to(tl.int32)
    last = tl.minimum(tl.floor(centre + 2.0 * stretch + 0.5).to(tl.int32), high)
    total = tl.zeros((P,), tl.float32)
    red = tl.zeros((L, P), tl.float32)
    green = tl.zeros((L, P), tl.float32)
    blue = tl.zeros((L, P), tl.float32)
    for tap in range(0, tl.floor(4.0 * stretch).to(tl.int32) + 2):
        pixel = first + tap
        seen = pixel < last
        weight = tl.where(seen, _cubic(tl.abs(pixel.to(tl.float32) + 0.5 - centre) / stretch), 0.0)
        total += weight
        pixels = source + (pixel if ALONG_ROWS else (pixel - low) * W)[None, :]
        mask = inside & seen[None, :]
        red += weight[None, :] * tl.load(pixels, mask, 0).to(tl.float32)
        green += weight[None, :] * tl.load(pixels + plane, mask, 0).to(tl.float32)
        blue += weight[None, :] * tl.load(pixels + 2 * plane, mask, 0).to(tl.float32)

    share = 1.0 / total[None, :]
    tl.store(target, _rounded(red * share), inside)
    tl.store(target + out_plane, _rounded(green * share), inside)
    tl.store(target + 2 * out_plane, _rounded(blue * share), inside)


def by_triton(images, down: Axis, across: Axis, size: tuple[int, int], flip: Tensor) -> Tensor:
    """Images (3, h, w), the plans of their rows and columns -> (B, 3, *size). Nothing waits for the GPU."""
    (height, width), device = size, images[0].device
    images = [image.contiguous() for image in images]  # planes apart; a decoder's images already are
    sides, read = torch.tensor([image.shape[1:] for image in images]), (down.last - down.first).long()
    lengths = (3 * width * read + 15) // 16 * 16  # parts of the buffer are aligned for the second launch
    first = down.first.long() * sides[:, 1] + across.start.floor().long()
    address = torch.tensor([image.data_ptr() for image in images]) + first
    entry = [address, sides[:, 1], sides.prod(1), read, lengths.cumsum(0) - lengths, flip]
    buffer = torch.empty(int(lengths.sum()), dtype=torch.uint8, device=device)
    out = torch.empty(len(images), 3, *size, dtype=torch.uint8, device=device)
    with torch.cuda.device_of(out):
        for axis, low, high, lines, block, length in (
            (across, across.low, across.high, read, (ROWS, COLUMNS), width),
            (down, down.first, down.last, torch.full_like(read, width), (COLUMNS, ROWS), height),
        ):
            origin = axis.start.floor()
            start, scale = (v.view(torch.int64) for v in (axis.start - origin, axis.scale))
            table = torch.stack(
                [v.long() for v in (*entry, low - origin, high - origin, start, scale)], dim=1
            )
            blocks = triton.cdiv(lines, block[0])
            image = torch.arange(len(images)).repeat_interleave(blocks)
            number = torch.arange(len(image)) - (blocks.cumsum(0) - blocks)[image]
            work = torch.stack([image, number * block[0]], dim=1)
            resample[len(work), triton.cdiv(length, block[1])](
                send(table, device), send(work, device), buffer, out, axis is across, *size, *block
            )
    return out
