"""RandAugment on whole batches: timm's policy and its fifteen increasing operations, uint8 in, uint8 out.

B batch, n images of it that get the same treatment, H W rows and columns of pixels, L layers.

timm runs PIL's operations one image at a time. Here the images of a batch are sorted by operation, and the
operations by how they work, so that a layer takes a handful of calls for any B. Against PIL:

    AutoContrast, Equalize, Invert, Posterize, Solarize, SolarizeAdd, Contrast, Brightness
        a new value for each old one, so one table of 256 entries a channel: equal to the bit
    Color, Sharpness
        a blend with the grey and with the smoothed image: equal to the bit, eager; compiled for a GPU, a product
        and a sum may become one operation, which differs by one grey level where the result is almost whole
    Rotate, ShearX, ShearY, TranslateXRel, TranslateYRel
        PIL interpolates in double precision and cuts off the fraction; float32 differs by one grey level where
        the value is almost whole (a shift by fifths of a pixel makes one in 125 whole, which then depends on
        the rounding of either), and by the fill where a place is within 1e-6 of the image's border

PIL's bicubic of these is not that of its resizing: a = -1 here, -0.5 there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from cpvt.data.device import fused, send
from cpvt.errors import ConfigError
from cpvt.rng import integers, normal, uniform

_EDGE = 10  # timm's largest magnitude


# --------------------------------------------------------------------------- the policy


class Notation(NamedTuple):
    """timm's text for a policy, read."""

    magnitude: int = 10
    layers: int = 2  # operations an image, drawn with replacement
    spread: float = 0.0  # standard deviation of the magnitude
    probability: float = 0.5  # of each layer being applied at all


def parse(text: str) -> Notation:
    """ "rand-m9-mstd0.5-inc1" -> its numbers. Raises ConfigError for a section that is not timm's or not here."""
    name, *sections = text.split("-")
    found = [re.fullmatch(r"(m|n|mstd|p|inc)(\d+|\d*\.\d+)", section) for section in sections]
    if name != "rand" or None in found or len({f[1] for f in found}) < len(found):
        raise ConfigError(
            f"augment.randaugment={text!r}; expected a form such as 'rand-m9-n2-p0.5-mstd0.5-inc1'"
        )
    given = {f[1]: float(f[2]) for f in found}
    default = Notation()
    magnitude, layers = given.get("m", default.magnitude), given.get("n", default.layers)
    spread, probability = given.get("mstd", default.spread), given.get("p", default.probability)
    if given.get("inc") != 1:
        raise ConfigError(f"augment.randaugment={text!r}; only the increasing set is here: write inc1")
    # Beyond 10 timm only clips, and from mstd100 on it means something else (an even draw).
    if (
        not (magnitude <= _EDGE and layers >= 1 and spread <= 100 and probability <= 1)
        or layers % 1
        or magnitude % 1
    ):
        raise ConfigError(
            f"augment.randaugment={text!r}; expected whole m 0 to {_EDGE}, whole n 1 or more, mstd to 100, p to 1"
        )
    return Notation(int(magnitude), int(layers), spread, probability)


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
        level = (level + notation.spread * normal("randaugment/level", *where)).clamp(0, _EDGE)
    sign = 1.0 - 2.0 * integers("randaugment/sign", 2, *where).double()
    return Policy(operation, level, sign)


class RandAugment:
    """Images (B, 3, H, W) uint8 -> the same, changed in place. `fill` is the colour outside a moved image."""

    def __init__(self, text: str, fill: tuple[int, int, int], seed: int, compile: bool = True):
        self.notation, self.fill, self.seed, self.compile = parse(text), fill, seed, compile

    def draw(self, epoch: int, positions: Tensor) -> Policy:
        return draw_policy(self.notation, self.seed, epoch, positions)

    def __call__(self, images: Tensor, policy: Policy) -> Tensor:
        for layer in zip(*(part.T for part in policy), strict=True):
            run_layer(images, Policy(*layer), self.fill, self.compile)
        return images


def run_layer(images: Tensor, policy: Policy, fill: tuple[int, int, int], compile: bool = True) -> None:
    """One operation for each image (B, 3, H, W), in place; the policy's tensors are (B,), on the CPU.

    Nothing is read back from a GPU: which images get what is known on the CPU beforehand.
    """
    device, order = images.device, policy.operation.argsort(stable=True)
    counts = torch.bincount(policy.operation + 1, minlength=len(OPERATIONS) + 1).tolist()
    # One piece an operation; the first is of the images left alone.
    places, levels, signs = (
        part.split(counts)[1:]
        for part in (send(order, device), policy.level[order] / _EDGE, policy.sign[order])
    )
    for run in RUNS:
        chosen = [
            (place, kind.prepare(images, place, kind.argument(level, sign), fill))
            for kind, place, level, sign in zip(OPERATIONS.values(), places, levels, signs, strict=True)
            if kind.run is run and len(place)
        ]
        if not chosen:
            continue
        place = torch.cat([place for place, _ in chosen])
        needs = torch.cat([send(need, device) for _, need in chosen])
        step = len(place) if images.is_cuda else max(1, _CACHED // images[0, 0].numel())
        for part, need in zip(place.split(step), needs.split(step), strict=True):
            images.index_copy_(0, part, run(images.index_select(0, part), need, compile))


_CACHED = 2**16  # pixels that a CPU works on at once, so that what is in between stays in its cache


def _whole(run: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor, bool], Tensor]:
    """A run that is compiled as one piece, where it is."""
    return lambda images, needs, compile: fused(run, compile, images, needs)


# --------------------------------------------------------------------------- by a table


@_whole
def look_up(images: Tensor, table: Tensor) -> Tensor:
    """Each value replaced by its entry in `table` (n, 3, 256) uint8."""
    return table.gather(2, images.flatten(2).long()).view_as(images)


def _plain_table(function: Callable[[Tensor, Tensor], Tensor]) -> Callable:
    """A table that the argument alone decides: `function(old values (256,), argument (n, 1))`, on the CPU."""

    def prepare(images, place, argument, fill):
        return (
            function(torch.arange(256), argument[:, None]).to(torch.uint8)[:, None].expand(len(place), 3, 256)
        )

    return prepare


def _autocontrast(images, place, argument, fill):
    values = images.index_select(0, place).flatten(2)
    low, high = values.amin(2, keepdim=True).double(), values.amax(2, keepdim=True).double()
    scale = torch.full_like(low, 255) / (high - low).clamp(min=1)  # 255 / ... would multiply by a reciprocal
    old = torch.arange(256, device=images.device)
    new = (old * scale + -low * scale).clamp(0, 255)
    return torch.where(high > low, new, old).to(torch.uint8)


def _equalise(images, place, argument, fill):
    values = images.index_select(0, place).flatten(0, 1).flatten(1)  # (3n, H W)
    rows, pixels = values.shape
    index = values.long().add_(256 * torch.arange(rows, device=images.device)[:, None]).flatten()
    counts = torch.zeros(rows * 256, dtype=torch.int32, device=images.device)
    counts = counts.scatter_add_(0, index, counts.new_ones(1).expand(len(index))).view(-1, 3, 256).long()
    old = torch.arange(256, device=images.device)
    brightest = counts.gather(2, (old * (counts > 0)).amax(2, keepdim=True))
    step = (pixels - brightest) // 255  # 0 where there is one value only, too
    new = (step // 2 + counts.cumsum(2) - counts) // step.clamp(min=1)
    return torch.where(step > 0, new.clamp(max=255), old).to(torch.uint8)


def _contrast(images, place, argument, fill):
    pixels = images[0, 0].numel()
    total = _grey(images.index_select(0, place)).flatten(1).sum(1)[:, None, None]
    grey = ((2 * total + pixels) // (2 * pixels)).float()  # the mean, rounded; in whole numbers on any device
    factor = send(argument.float(), images.device)[:, None, None]
    table = _blend(grey, torch.arange(256.0, device=images.device), factor)
    return table.expand(len(place), 3, 256)


# --------------------------------------------------------------------------- by a blend


def _blend(low: Tensor, high: Tensor, factor: Tensor) -> Tensor:
    """PIL's blend of float32 values 0 to 255: the fraction is cut off, not rounded."""
    return (low + factor * (high - low)).clamp(0, 255).to(torch.uint8)


def _grey(images: Tensor) -> Tensor:
    """(n, 3, H, W) uint8 -> (n, H, W) int32: PIL's conversion to L, in 16-bit fixed point."""
    red, green, blue = images.int().unbind(1)
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


@_whole
def colour(images: Tensor, factor: Tensor) -> Tensor:
    """Away from (factor above 1) or towards (below) the grey image. factor (n,) float32."""
    return _blend(_grey(images)[:, None].float(), images.float(), factor[:, None, None, None])


@_whole
def sharpen(images: Tensor, factor: Tensor) -> Tensor:
    """Away from or towards the smoothed image, whose outermost pixels PIL leaves as they are."""
    sharp = images.float()
    rows = sharp[:, :, :-2] + sharp[:, :, 1:-1] + sharp[:, :, 2:]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * sharp[:, :, 1:-1, 1:-1]
    smooth = sharp.clone()
    # (total + 6.5) / 13 is 1/26 or more from a whole number, so float32 rounds as PIL does.
    smooth[:, :, 1:-1, 1:-1] = ((total + 6.5) / 13).floor()
    return _blend(smooth, sharp, factor[:, None, None, None])


def _factor(images, place, argument, fill):
    return argument.float()


# --------------------------------------------------------------------------- by moving pixels


def _slide(images: Tensor, motion: Tensor) -> Tensor:
    """Each row moved along itself. motion (n, 5) float64: by so much a row, by so much at all, fill colour."""
    height, width = images.shape[2:]
    whole, part = _split(motion[:, :1] * _centres(height, images) + motion[:, 1:2])  # (n, H)
    column = whole[:, :, None] + torch.arange(width, device=images.device)  # (n, H, W)
    row = torch.arange(height, device=images.device)[:, None]
    value = _along(_pack(images), row, column, part[:, None, :, None])
    nearest = column + (part >= 0.5)[:, :, None]
    return _finish(value, (nearest >= 0) & (nearest < width), motion[:, 2:])


slide = _whole(_slide)


@_whole
def slide_down(images: Tensor, motion: Tensor) -> Tensor:
    """The same with columns for rows."""
    return _slide(images.mT.contiguous(), motion).mT


def rotate(images: Tensor, motion: Tensor, compile: bool) -> Tensor:
    """About the centre, counter-clockwise. motion (n, 5) float64: cosine, sine, fill colour."""
    height, width = images.shape[2:]
    cosine, sine = motion[:, 0, None, None], motion[:, 1, None, None]
    down = (_centres(height, images) - height / 2)[:, None]
    across = _centres(width, images) - width / 2
    # Where a pixel comes from, as a part that only its column decides and one that only its row does: so all
    # but the sum of two fractions is done in double precision, on few numbers.
    x, dx = _sum(_split(cosine * across + (width / 2 - 0.5)), _split(sine * down))
    y, dy = _sum(_split(cosine * down + (height / 2 - 0.5)), _split(-sine * across))
    packed, dx, dy = _pack(images), dx[:, None], dy[:, None]
    # One row of taps at a time is compiled: the compiler takes minutes over all sixteen at once.
    taps = ((y + tap).clamp(0, height - 1) for tap in (-1, 0, 1, 2))
    value = fused(_cubic, compile, *(fused(_along, compile, packed, row, x, dx) for row in taps), dy)
    column, row = x + (dx[:, 0] >= 0.5), y + (dy[:, 0] >= 0.5)
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    return _finish(value, inside, motion[:, 2:])


def _centres(count: int, like: Tensor) -> Tensor:
    return torch.arange(count, device=like.device, dtype=torch.float64) + 0.5


def _split(place: Tensor) -> tuple[Tensor, Tensor]:
    """float64 -> whole part, int64, and fraction, float32."""
    whole = place.floor()
    return whole.long(), (place - whole).float()


def _sum(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    fraction = one[1] + other[1]
    carry = fraction >= 1
    return one[0] + other[0] + carry, fraction - carry.float()


def _pack(images: Tensor) -> Tensor:
    """(n, 3, H, W) uint8 -> (n, H, W) int32: a pixel's colours in one number, so that one gather fetches all."""
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
    slope, rest = high - before, before - low
    return low + part * (slope + part * (2 * rest + high - after + part * (after - high - rest)))


def _finish(value: Tensor, inside: Tensor, fill: Tensor) -> Tensor:
    """Cuts to uint8 and paints what lies outside."""
    return torch.where(inside[:, None], value.clamp(0, 255), fill.float()[:, :, None, None]).to(torch.uint8)


def _motion(function: Callable[[Tensor, int, int], tuple[Tensor, Tensor]]) -> Callable:
    def prepare(images, place, argument, fill):
        colours = [torch.full_like(argument, value) for value in fill]
        return torch.stack([*function(argument, *images.shape[2:]), *colours], dim=1)

    return prepare


def _turn(degrees: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    angle = -degrees * (math.pi / 180)
    return angle.cos(), angle.sin()


# --------------------------------------------------------------------------- the fifteen


class Operation(NamedTuple):
    """How a level becomes pixels."""

    argument: Callable[[Tensor, Tensor], Tensor]  # level / 10 and sign -> degrees, bits, factor, ...
    prepare: Callable[..., Tensor]  # images, place (n,), argument (n,), fill -> what `run` needs, (n, ...)
    run: Callable[[Tensor, Tensor, bool], Tensor]  # images (n, 3, H, W), needs, compile -> new images


def _nothing(level, sign):
    return torch.zeros_like(level)


def _up_to(most: float) -> Callable:
    return lambda level, sign: sign * (level * most)


def _enhance(level, sign):
    return (1 + sign * (level * 0.9)).clamp(min=0.1)


OPERATIONS: dict[str, Operation] = {  # in timm's order
    "AutoContrast": Operation(_nothing, _autocontrast, look_up),
    "Equalize": Operation(_nothing, _equalise, look_up),
    "Invert": Operation(_nothing, _plain_table(lambda old, nothing: 255 - old + nothing), look_up),
    "Rotate": Operation(_up_to(30), _motion(_turn), rotate),  # degrees
    "PosterizeIncreasing": Operation(  # bits kept
        lambda level, sign: 4 - (level * 4).floor(),
        _plain_table(lambda old, bits: old & (256 - 2 ** (8 - bits.long()))),
        look_up,
    ),
    "SolarizeIncreasing": Operation(  # from this value on
        lambda level, sign: 256 - (level * 256).floor(),
        _plain_table(lambda old, least: torch.where(old < least, old, 255 - old)),
        look_up,
    ),
    "SolarizeAdd": Operation(  # so much to the darker half
        lambda level, sign: (level * 110).floor(),
        _plain_table(lambda old, more: torch.where(old < 128, (old + more).clamp(max=255), old)),
        look_up,
    ),
    "ColorIncreasing": Operation(_enhance, _factor, colour),
    "ContrastIncreasing": Operation(_enhance, _contrast, look_up),
    "BrightnessIncreasing": Operation(
        _enhance,
        _plain_table(lambda old, factor: _blend(torch.zeros(1), old.float(), factor.float())),
        look_up,
    ),
    "SharpnessIncreasing": Operation(_enhance, _factor, sharpen),
    # Rows (columns) a pixel apart move by so much; then shares of the width (height).
    "ShearX": Operation(_up_to(0.3), _motion(lambda value, *_: (value, 0 * value)), slide),
    "ShearY": Operation(_up_to(0.3), _motion(lambda value, *_: (value, 0 * value)), slide_down),
    "TranslateXRel": Operation(_up_to(0.45), _motion(lambda value, _, w: (0 * value, value * w)), slide),
    "TranslateYRel": Operation(_up_to(0.45), _motion(lambda value, h, _: (0 * value, value * h)), slide_down),
}
NAMES = tuple(OPERATIONS)
RUNS = tuple(dict.fromkeys(kind.run for kind in OPERATIONS.values()))
