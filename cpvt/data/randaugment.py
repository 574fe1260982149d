"""RandAugment on whole batches: timm's policy and its fifteen increasing operations, uint8 in, uint8 out.

timm runs PIL's operations one image at a time. Here an operation takes all images of a batch that get it. On a CPU
tables and blends equal PIL's to the bit. Moves, and on a GPU Color and Sharpness, differ by one grey level where a
value is almost whole: PIL interpolates in double precision (with a = -1) and cuts off the fraction, and a compiler
makes one operation of a product and a sum.

Letters: B images of a batch, n of them that get the same operation, H W rows and columns of pixels, L layers.
"""

import functools
import math
import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from cpvt.errors import ConfigError
from cpvt.rng import integers, normal, uniform

FILL = (124, 116, 104)  # what is shown where a moved image was not: ImageNet's mean colour, as timm rounds it
LARGEST = 10  # timm's scale of magnitudes
CACHED = 2**16  # pixels that a CPU works on at once, so that what is in between stays in its cache


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU -> the device. A plain copy to a GPU would wait for all that is queued there."""
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.contiguous().pin_memory()
    return tensor.to(device, non_blocking=True)


def at_once(images: Tensor) -> int:
    """How many of (B, 3, H, W) images are worked on at a time: all on a GPU, on a CPU what its cache holds."""
    return len(images) if images.is_cuda else max(1, CACHED // images.shape[2:].numel())


def fused(function: Callable) -> Callable:
    """The same function, compiled where tensors lie on a GPU: one pass over memory, not one an operation."""

    @functools.wraps(function)
    def run(pixels: Tensor, *others: Tensor) -> Tensor:
        return (_compiled(function) if pixels.is_cuda else function)(pixels, *others)

    return run


@functools.cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=True)  # how many images get an operation differs from call to call


# --------------------------------------------------------------------------- the policy


class Notation(NamedTuple):
    """timm's text for a policy, read."""

    magnitude: int = 10
    layers: int = 2  # operations an image, drawn with replacement
    spread: float = 0.0  # standard deviation of the magnitude
    probability: float = 0.5  # of each layer being applied at all


def parse(text: str) -> Notation:
    """ "rand-m9-mstd0.5-inc1" -> its numbers. Raises ConfigError for what is not timm's, or not here."""
    name, *sections = text.split("-")
    found = [re.fullmatch(r"(m|n|mstd|p|inc)(\d+|\d*\.\d+)", section) for section in sections]
    given = {f[1]: float(f[2]) for f in found if f}
    m, n, spread, p = (given.get(k, v) for k, v in zip(("m", "n", "mstd", "p"), Notation(), strict=True))
    # Beyond 10 timm only clips, and from mstd100 on it means something else (an even draw).
    fine = m <= LARGEST and n >= 1 and spread <= 100 and p <= 1 and not (m % 1 or n % 1)
    if name != "rand" or len(given) < len(sections) or given.get("inc") != 1 or not fine:
        words = f"with whole m to {LARGEST}, whole n from 1, mstd to 100, p to 1, and inc1 (increasing)"
        raise ConfigError(f"augment.randaugment={text!r}: expected 'rand-m9-n2-p0.5-mstd0.5-inc1', {words}")
    return Notation(int(m), int(n), spread, p)


class Policy(NamedTuple):
    """What happens to each image, in each layer: (B, L) on the CPU."""

    operation: Tensor  # int64, a place in NAMES; -1: nothing
    level: Tensor  # float64, 0 to 10
    sign: Tensor  # float64, -1 or 1; of no meaning to some operations


def draw_policy(notation: Notation, seed: int, epoch: int, positions: Tensor) -> Policy:
    """Positions in the stream of an epoch (B,) -> the policy of each, whatever the others are."""
    where = seed, epoch, positions[:, None], torch.arange(notation.layers)
    operation = integers("randaugment/operation", len(OPERATIONS), *where)
    operation[uniform("randaugment/apply", *where) >= notation.probability] = -1
    level = torch.full(operation.shape, float(notation.magnitude), dtype=torch.float64)
    if notation.spread:
        level = (level + notation.spread * normal("randaugment/level", *where)).clamp(0, LARGEST)
    return Policy(operation, level, 1.0 - 2.0 * integers("randaugment/sign", 2, *where).double())


def rand_augment(images: Tensor, policy: Policy) -> None:
    """Changes images (B, 3, H, W) uint8 in place."""
    for layer in zip(*(part.T for part in policy), strict=True):
        run_layer(images, Policy(*layer))


def run_layer(images: Tensor, policy: Policy) -> None:
    """One operation for each image (B, 3, H, W), in place; the policy's tensors are (B,).

    Nothing is read back from a GPU: which images get what is known on the CPU beforehand.
    """
    order = policy.operation.argsort(stable=True)
    counts = torch.bincount(policy.operation + 1, minlength=len(OPERATIONS) + 1).tolist()
    columns = (send(c, images.device) for c in (order, policy.level[order] / LARGEST, policy.sign[order]))
    pieces = (column.split(counts)[1:] for column in columns)  # the first is of the images left alone
    for operate, *chosen in zip(OPERATIONS.values(), *pieces, strict=True):
        for which, level, sign in zip(*(column.split(at_once(images)) for column in chosen), strict=True):
            if len(which):
                images.index_copy_(0, which, operate(images.index_select(0, which), level, sign))


# An operation: images (n, 3, H, W) uint8, levels 0 to 1 and signs (n,) float64, all on one device -> images.
# --------------------------------------------------------------------------- by a table


@fused
def look_up(images: Tensor, table: Tensor) -> Tensor:
    """Each value replaced by its entry in the table, (n, 3, 256) uint8."""
    return table.gather(2, images.flatten(2).long()).view_as(images)


def by_table(function: Callable) -> Callable:
    """From a function of the old values (256,), levels and signs (n, 1, 1), and images to the new values."""

    def operate(images: Tensor, level: Tensor, sign: Tensor) -> Tensor:
        old, how = torch.arange(256, device=images.device), (level[:, None, None], sign[:, None, None])
        table = function(old, *how, images).to(torch.uint8).expand(len(images), 3, 256)
        return look_up(images, table.contiguous())  # of one layout, for the compiler

    return operate


def autocontrast(old, level, sign, images):
    values = images.flatten(2)
    low, high = values.amin(2, keepdim=True).double(), values.amax(2, keepdim=True).double()
    scale = torch.full_like(low, 255) / (high - low).clamp(min=1)  # 255 / ... would multiply by a reciprocal
    return torch.where(high > low, (old * scale + -low * scale).clamp(0, 255), old)


def equalise(old, level, sign, images):
    rows, pixels = 3 * len(images), images.shape[2:].numel()
    index = images.view(rows, pixels).long() + 256 * torch.arange(rows, device=images.device)[:, None]
    ones = torch.ones(1, dtype=torch.int32, device=images.device).expand(index.numel())
    counts = torch.zeros(rows * 256, dtype=torch.int32, device=images.device)
    counts = counts.scatter_add_(0, index.flatten(), ones).view(-1, 3, 256).long()
    brightest = counts.gather(2, (old * (counts > 0)).amax(2, keepdim=True))
    step = (pixels - brightest) // 255  # 0 where there is one value only, too
    new = (step // 2 + counts.cumsum(2) - counts) // step.clamp(min=1)
    return torch.where(step > 0, new.clamp(max=255), old)


def contrast(old, level, sign, images):
    pixels = images.shape[2:].numel()
    total = _grey(images).flatten(1).sum(1)[:, None, None]
    grey = (2 * total + pixels) // (2 * pixels)  # the mean, rounded; in whole numbers on any device
    return _blend(grey.float(), old.float(), _factor(level, sign))


# --------------------------------------------------------------------------- by a blend


def _factor(level: Tensor, sign: Tensor) -> Tensor:
    return (1 + sign * (level * 0.9)).clamp(min=0.1).float()


def _blend(low: Tensor | float, high: Tensor, factor: Tensor) -> Tensor:
    """PIL's blend of float32 values 0 to 255: the fraction is cut off, not rounded."""
    return (factor * (high - low)).add_(low).clamp_(0, 255).to(torch.uint8)


def _grey(images: Tensor) -> Tensor:
    """(n, 3, H, W) uint8 -> (n, H, W) int32: PIL's conversion to L, in 16-bit fixed point."""
    red, green, blue = images.int().unbind(1)
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


@fused
def colour(images: Tensor, factor: Tensor) -> Tensor:
    """Away from (factor above 1) or towards (below) the grey image. factor (n,) float32."""
    return _blend(_grey(images)[:, None].float(), images.float(), factor[:, None, None, None])


@fused
def sharpen(images: Tensor, factor: Tensor) -> Tensor:
    """Away from or towards the smoothed image, whose outermost pixels PIL leaves as they are."""
    sharp = images.float()
    rows = sharp[:, :, :-2] + sharp[:, :, 1:-1] + sharp[:, :, 2:]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * sharp[:, :, 1:-1, 1:-1]
    smooth = sharp.clone()
    # (total + 6.5) / 13 is 1/26 or more from a whole number, so float32 rounds as PIL does.
    smooth[:, :, 1:-1, 1:-1] = ((total + 6.5) / 13).floor()
    return _blend(smooth, sharp, factor[:, None, None, None])


# --------------------------------------------------------------------------- by moving pixels


def move(images: Tensor, across: tuple, down: tuple | None = None) -> Tensor:
    """Pixel (x, y) of the result is read at a x + b y + c, in pixels, with (a, b, c) of `across` and of `down`:
    numbers, or (n,) float64 each. `down` None: in its own row."""
    height, width = images.shape[2:]
    y, x = (torch.arange(n, device=images.device, dtype=torch.float64) + 0.5 for n in (height, width))
    inside, column, dx = _place(*across, x, y[:, None], width)
    within, row, dy = _place(*(down or (0, 1, 0)), x if down else 0, y[:, None], height)
    interpolate = _at_once if images.is_cuda else _in_pieces
    return interpolate(images, inside & within, row, column, dx, dy if down else None)


def _place(a, b, c, x, y, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Along one axis: whether it is inside, the nearest centre above or to the left, how far it is from there."""
    a, b, c = (v[:, None, None] if isinstance(v, Tensor) else v for v in (a, b, c))
    at = a * x + b * y + c
    inside = (at >= 0).logical_and_(at < length)
    centre = at.sub_(0.5).floor()
    return inside, centre, at.sub_(centre).float()


def _at_once(images: Tensor, inside: Tensor, row: Tensor, column: Tensor, dx: Tensor, dy) -> Tensor:
    packed, row, column = _pack(images), row.long().expand_as(column).contiguous(), column.long()
    if dy is None:
        value = along(packed, row, column, dx[:, None])
    else:  # one row of taps at a time is compiled: the compiler takes minutes over all sixteen at once
        last = images.shape[2] - 1
        taps = (along(packed, (row + i).clamp(0, last), column, dx[:, None]) for i in (-1, 0, 1, 2))
        value = cubic(*taps, dy[:, None])
    channels = zip(value.clamp(0, 255).to(torch.uint8).unbind(1), FILL, strict=True)
    return torch.stack([torch.where(inside, channel, fill) for channel, fill in channels], dim=1)


def _in_pieces(images: Tensor, inside: Tensor, row: Tensor, column: Tensor, dx: Tensor, dy) -> Tensor:
    """The same to the bit, for a CPU: four bytes a pixel, no more pixels at a time than its cache holds."""
    n, _, height, width = images.shape
    high, wide = height + 4, width + 4  # with two more pixels on each side no tap lies outside
    down, across = (torch.arange(-2, size + 2).clamp_(0, size - 1) for size in (height, width))
    packed = _pack(images)[:, down[:, None], across].flatten()
    index = (row.clamp(-1, height - 1) + (high * torch.arange(n)[:, None, None] + 1)).mul_(wide).add_(1)
    index = column.clamp_(-1, width - 1).add_(index).int()  # of the first of sixteen taps
    moved = torch.empty(inside.shape, dtype=torch.int32)

    def along(down: int, index: Tensor, part: Tensor) -> Tensor:
        starts = (packed[down * wide + tap :] for tap in range(4))
        return _cubic(*(start.index_select(0, index).view(torch.uint8).float() for start in starts), part)

    pieces = (each.flatten().split(CACHED // 8) for each in (moved, index, dx, dx if dy is None else dy))
    for piece, at, *parts in zip(*pieces, strict=True):
        right, below = (part[:, None].expand(-1, 4).flatten() for part in parts)
        value = along(1, at, right)
        if dy is not None:
            value = _cubic(along(0, at, right), value, along(2, at, right), along(3, at, right), below)
        piece.view(torch.uint8).copy_(value.clamp_(0, 255))
    moved.masked_fill_(~inside, FILL[0] | FILL[1] << 8 | FILL[2] << 16)
    return moved.view(torch.uint8).unflatten(2, (width, 4))[..., :3].permute(0, 3, 1, 2).contiguous()


def shear(images: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    return move(images, (1, sign * (level * 0.3), 0))


def translate(images: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    return move(images, (1, 0, sign * (level * 0.45) * images.shape[3]))


def rotate(images: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    """About the centre, by up to 30 degrees."""
    y, x = (n / 2 for n in images.shape[2:])
    angle = -sign * (level * 30) * (math.pi / 180)
    c, s = angle.cos(), angle.sin()
    return move(images, (c, s, x - c * x - s * y), (-s, c, y + s * x - c * y))


def _pack(images: Tensor) -> Tensor:
    """(n, 3, H, W) uint8 -> (n, H, W) int32: a pixel's colours in one number, for one gather to fetch all."""
    red, green, blue = images.int().unbind(1)
    return red | green << 8 | blue << 16


def _along(packed: Tensor, row: Tensor, column: Tensor, part: Tensor) -> Tensor:
    """Interpolates along rows: the values of (n, H, W) pixels at column + part, (n, 3, H, W) float32."""
    image = torch.arange(len(packed), device=packed.device)[:, None, None]
    shift = torch.arange(0, 24, 8, device=packed.device, dtype=torch.int32)[:, None, None]
    columns = ((column + tap).clamp(0, packed.shape[2] - 1) for tap in (-1, 0, 1, 2))
    pixels = (packed[image, row, column][:, None] for column in columns)
    return _cubic(*(((pixel >> shift) & 255).float() for pixel in pixels), part)


def _cubic(before: Tensor, low: Tensor, high: Tensor, after: Tensor, part: Tensor) -> Tensor:
    """The cubic through four neighbours at `part` (0 to 1) of the way from `low` to `high`; a = -1."""
    rest = before - low
    bend = (after - high).sub_(rest).mul_(part)  # in place: on a CPU new memory costs more than a sum
    bend = rest.mul_(2).add_(high).sub_(after).add_(bend).mul_(part).add_(high - before)
    return bend.mul_(part).add_(low)


along, cubic = fused(_along), fused(_cubic)


OPERATIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {  # in timm's order
    "AutoContrast": by_table(autocontrast),
    "Equalize": by_table(equalise),
    "Invert": by_table(lambda old, *_: 255 - old),
    "Rotate": rotate,
    # By the level: how many bits are kept, from which value on is inverted, what is added to dark ones.
    "PosterizeIncreasing": by_table(lambda old, level, *_: old & (256 - (16 << (level * 4).long()))),
    "SolarizeIncreasing": by_table(
        lambda old, level, *_: torch.where(old < 256 - (level * 256).floor(), old, 255 - old)
    ),
    "SolarizeAdd": by_table(
        lambda old, level, *_: (old + (old < 128) * (level * 110).floor()).clamp(max=255)
    ),
    "ColorIncreasing": lambda images, *how: colour(images, _factor(*how)),
    "ContrastIncreasing": by_table(contrast),
    "BrightnessIncreasing": by_table(lambda old, *how: _blend(0.0, old.float(), _factor(*how[:2]))),
    "SharpnessIncreasing": lambda images, *how: sharpen(images, _factor(*how)),
    "ShearX": shear,
    "ShearY": lambda images, *how: shear(images.mT, *how).mT,
    "TranslateXRel": translate,
    "TranslateYRel": lambda images, *how: translate(images.mT, *how).mT,
}
NAMES = tuple(OPERATIONS)
