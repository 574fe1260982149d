"""What a model knows about position: how far it sees, what a shuffle or a shift changes, what a probe reads off.

Letters: n images, C channels, N = H*W patches, D width, (H, W) grid, p patch size. Models, ours or timm's, need
`forward_features`, `forward_head`, `patch_embed` and `num_prefix_tokens`; images go to the device of the model.
Where exactness is the point, a copy of the model runs in float64, in evaluation.
"""

import copy
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from cpvt.config import Grid, Peg, parse_encoding
from cpvt.data.synthetic import BACKGROUND, COLOUR_A, COLOUR_B
from cpvt.errors import UserError
from cpvt.training.evaluate import evaluating


class ProbeError(UserError):
    """A probe that makes no sense; one line: what was given, what was expected, what to do."""


def _exact(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double().eval()


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _pair(patch: int | Grid) -> Grid:
    """A model of ours has a number, timm's a pair."""
    return (patch, patch) if isinstance(patch, int) else tuple(patch)


def _summary(model: nn.Module, images: Tensor) -> Tensor:
    """(n, C, height, width) -> (n, D): what the head reads, the class token or the mean of the patches."""
    return model.forward_head(model.forward_features(images), pre_logits=True)


def _relative(change: Tensor, reference: Tensor) -> float:
    """No change of nothing is 0; without any numbers it is NaN."""
    return float(change.norm() / reference.norm()) if change.any() or not change.numel() else 0.0


# --------------------------------------------------------------------------- how far


def scene(model: nn.Module, grid: Grid, objects: Iterable, background=BACKGROUND) -> Tensor:
    """-> (1, C, H*p, W*p) float64: a plain background; objects of one token, ((row, column), colour) each."""
    image = torch.tensor(background, dtype=torch.float64)[:, None, None].repeat(1, *grid)
    for (row, column), colour in objects:
        image[:, row, column] = torch.tensor(colour, dtype=torch.float64)
    down, across = _pair(model.patch_embed.patch_size)
    return image[None].repeat_interleave(down, 2).repeat_interleave(across, 3).to(device_of(model))


@torch.no_grad()
def reach(model: nn.Module, distances: Iterable[int] = range(6), grid: Grid = (14, 14)) -> Tensor:
    """-> (len(distances),) float64: how much what the head reads changes, relative to its size, when an
    object moves from the centre to `distance` empty tokens from the left border of a plain background.

    Rounding gives about 1e-15: then the model cannot know where the object is. Change means that it could,
    not that it has learned to.
    """
    model, (row, column), distances = _exact(model), (grid[0] // 2, grid[1] // 2), list(distances)
    farthest = min((n - 1) // 2 for n in grid)
    if not distances or not 0 <= min(distances) <= max(distances) <= farthest:
        raise ProbeError(f"distances={distances} on a {grid[0]}x{grid[1]} grid; give some of 0 to {farthest}")
    scenes = (scene(model, grid, [((row, x), COLOUR_A)]) for x in (column, *distances))
    centre, *moved = (_summary(model, image) for image in scenes)
    return torch.tensor([_relative(out - centre, centre) for out in moved], dtype=torch.float64)


@torch.no_grad()
def order_reach(model: nn.Module, separations: Iterable[int] = range(1, 9), grid: Grid = (14, 30)) -> Tensor:
    """-> (len(separations),) float64: how much what the head reads changes, relative to its size, when two
    objects in the middle row, `separation` columns apart, change places.

    The grid must be wide enough for its borders to stay out of reach of both: else they tell the order.
    """
    model, row, changes = _exact(model), grid[0] // 2, []
    for separation in separations:
        if not 1 <= separation < grid[1]:
            raise ProbeError(f"separation {separation} on {grid[1]} columns; expected 1 to {grid[1] - 1}")
        left = (grid[1] - 1 - separation) // 2
        first, second = (row, left), (row, left + separation)
        scenes = [(first, COLOUR_A), (second, COLOUR_B)], [(first, COLOUR_B), (second, COLOUR_A)]
        one, other = (_summary(model, scene(model, grid, objects)) for objects in scenes)
        changes.append(_relative(other - one, one))
    return torch.tensor(changes, dtype=torch.float64)


def theory(encoding: str) -> tuple[int, int] | None:
    """The largest distance to a border, and the largest separation of two objects, that PEGs make visible.

    Border and object each spread `kernel // 2` tokens a PEG, s in all, and must meet: 2s - 1; two objects: 2s.
    "none" gives (-1, 0): nothing; a circular padding shows no border: -1. None where the argument does not hold:
    for tables, angles, other paddings.
    """
    pegs = parse_encoding(encoding)
    if not all(isinstance(part, Peg) and part.padding in ("zero", "circular") for part in pegs):
        return None
    spread = sum(len(peg.positions) * peg.repeat * (peg.kernel // 2) for peg in pegs)
    border = any(peg.padding == "zero" and peg.kernel > 1 for peg in pegs)
    return (2 * spread - 1 if border else -1), 2 * spread


# --------------------------------------------------------------------------- shuffles and shifts


def shuffle_patches(images: Tensor, patch: int | Grid, order: Tensor) -> Tensor:
    """(n, C, H*p, W*p), order (N,) or (n, N) -> the same images, patch i taken from patch order[i]."""
    (p, q), (n, C, height, width) = _pair(patch), images.shape
    if height % p or width % q:
        raise ProbeError(f"images of {height}x{width} in patches of {p}x{q}; give multiples of the patch")
    grid = height // p, width // q
    patches = images.reshape(n, C, grid[0], p, grid[1], q).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    patches = patches[torch.arange(n)[:, None], order.expand(n, -1)]
    return patches.unflatten(1, grid).permute(0, 3, 1, 4, 2, 5).reshape(n, C, height, width)


class Permutation(NamedTuple):
    """Relative errors, about 1e-15 where it holds."""

    tokens: float  # "the tokens shuffle along"
    head: float  # "what the head reads stays"


@torch.no_grad()
def permutation_error(model: nn.Module, images: Tensor) -> Permutation:
    """Shuffles the patches of (n, C, height, width) and compares, in float64, with the images as they were."""
    model, images = _exact(model), images.to(device_of(model), torch.float64)
    P, before = model.num_prefix_tokens, model.forward_features(images)
    order = torch.randperm(before.shape[1] - P, generator=torch.Generator().manual_seed(0))
    after = model.forward_features(shuffle_patches(images, model.patch_embed.patch_size, order))
    expected, found = before[:, P:][:, order], after[:, P:]
    read, reread = (model.forward_head(x, pre_logits=True) for x in (before, after))
    return Permutation(_relative(found - expected, expected), _relative(reread - read, read))


class Equivariance(NamedTuple):
    """Relative errors of "shift the input, the output shifts along"; NaN where there are no such tokens."""

    interior: float  # away from the borders
    border: float


class MovedMaps(NamedTuple):
    """Maps of a shifted input and what they would be if the output shifted along, (n, D, H, W); which tokens of
    theirs (H, W) came from away from the borders, and which not."""

    found: Tensor
    expected: Tensor
    inside: Tensor
    outside: Tensor


@torch.no_grad()
def moved_maps(
    fn: Callable[[Tensor], Tensor],
    x: Tensor,
    shift: tuple[int, int],
    kind: Literal["circular", "zero", "window"] = "circular",
    border: int = 1,
    stride: int = 1,
) -> MovedMaps:
    """fn(shifted x) and fn(x) shifted, where fn: (n, C, H*stride, W*stride) -> (n, D, H, W).

    shift   tokens down and right (negative: up and left)
    kind    "circular": what leaves comes back on the other side; "zero": zeros come in; "window": x is a
            larger scene, and a frame that is |shift| smaller moves over it, so that real content comes in
    border  tokens fewer than this from a border, before or after the shift, count as border
    """
    if kind not in ("circular", "zero", "window"):
        raise ProbeError(f"kind={kind!r}; expected 'circular', 'zero' or 'window'")
    pixels, wrap = [s * stride for s in shift], kind == "circular"
    if kind == "window":
        (down, right), (height, width) = pixels, x.shape[2:]
        corners = (max(down, 0), max(right, 0)), (max(-down, 0), max(-right, 0))
        old, new = (x[:, :, a : a + height - abs(down), b : b + width - abs(right)] for a, b in corners)
    else:
        old, new = x, _shift(x, pixels, wrap)
    before, found = fn(old), fn(new)
    H, W = found.shape[2:]
    if not (abs(shift[0]) < H and abs(shift[1]) < W):
        raise ProbeError(f"shift={shift} on maps of {H}x{W}; shift by less than the map")
    if (H * stride, W * stride) != tuple(old.shape[2:]):
        raise ProbeError(f"{tuple(old.shape[2:])} -> {H}x{W} with stride={stride}; give the true stride")
    depth = 1 + _depth((H, W)).view(H, W)  # 1 on the border
    came, expected = _shift(depth, shift, wrap), _shift(before, shift, wrap)  # came: 0 where nothing did
    inside = (depth > border) & (came > border)
    return MovedMaps(found, expected, inside, ~inside & (came > 0))


def equivariance_error(fn: Callable[[Tensor], Tensor], x: Tensor, shift, *options, **named) -> Equivariance:
    """The relative error of the shifted output, |found - expected| / |expected|; arguments as in `moved_maps`."""
    moved = moved_maps(fn, x, shift, *options, **named)
    return Equivariance(*(split_error(moved, mask).total for mask in (moved.inside, moved.outside)))


class SplitError(NamedTuple):
    """Relative errors: of the whole map; of the vector that all its tokens share; of what is left of both."""

    total: float
    common: float
    pattern: float


def split_error(moved: MovedMaps, mask: Tensor) -> SplitError:
    """Of the tokens in `mask` (H, W), NaN without any; each relative to that part of the map."""
    if not mask.any():
        return SplitError(*[float("nan")] * 3)
    expected = moved.expected[:, :, mask]
    error = moved.found[:, :, mask] - expected
    shared, mean = error.mean(2, keepdim=True), expected.mean(2, keepdim=True)
    parts = (error, expected), (shared, mean), (error - shared, expected - mean)
    return SplitError(*(_relative(*part) for part in parts))


def _depth(grid: Grid) -> Tensor:
    """-> (N,): how many tokens lie between each and the nearest border."""
    position = torch.cartesian_prod(*map(torch.arange, grid))
    return torch.minimum(position, torch.tensor(grid) - 1 - position).amin(1)


def _shift(x: Tensor, shift, wrap: bool) -> Tensor:
    """(..., H, W) moved down and right; zeros come in, or with `wrap` what left."""
    (H, W), (down, right), out = x.shape[-2:], shift, x.roll(tuple(shift), (-2, -1))
    if not wrap:
        out[..., slice(0, down) if down >= 0 else slice(H + down, H), :] = 0
        out[..., slice(0, right) if right >= 0 else slice(W + right, W)] = 0
    return out


# --------------------------------------------------------------------------- reading the position off tokens


class Probe(NamedTuple):
    """R2 on held-out images, 1 at best: of row and column, over all tokens and over those off the border."""

    row: float
    column: float
    row_interior: float
    column_interior: float


def position_probe(features: Tensor, grid: Grid, *, ridge: float = 1e-6) -> Probe:
    """Fits row and column as linear functions of the tokens (n, N, D) of one half of the images, and reports
    R2 on the other half.

    Ridge regression in closed form, in float64; `ridge` is relative to the mean variance of a feature. R2
    of the interior is relative to the variance within it. Content can predict position (the sky is up): see
    `control_images`.
    """
    n, N, _ = features.shape
    if N != grid[0] * grid[1]:
        raise ProbeError(f"{N} tokens with grid={grid}; leave the prefix tokens out and give (H, W)")
    if n < 2:
        raise ProbeError(f"{n} image; the probe is fitted on one half of the images and read on the other")
    if not bool(torch.isfinite(features).all()):
        raise ProbeError("features hold infinities or NaN; find where the model makes them")
    order, dtype = torch.randperm(n, generator=torch.Generator().manual_seed(0)), features.dtype
    features = features.detach().cpu().double()[order]
    half = n // 2
    position = torch.cartesian_prod(*(torch.arange(side, dtype=torch.float64) for side in grid))  # (N, 2)
    x, y = features[:half].flatten(0, 1), position.repeat(half, 1)
    mean, target = x.mean(0), y.mean(0)
    x, y = x - mean, y - target
    gram = x.T @ x
    # Equal tokens differ by rounding, and position can be read off rounding too: it must not count.
    rounding = (1000 * torch.finfo(dtype).eps) ** 2 * features[:half].square().mean() * len(x)
    penalty = torch.maximum(ridge * gram.diagonal().mean(), rounding.clamp_min(1e-300))
    weight = torch.linalg.solve(gram + penalty * torch.eye(len(gram), dtype=torch.float64), x.T @ y)
    found = (features[half:] - mean) @ weight + target  # (n - half, N, 2)
    scores = []
    for mask in (_depth(grid) >= 0, _depth(grid) >= 1):  # NaN without such tokens
        wrong = (found[:, mask] - position[mask]).square().mean((0, 1))
        scores += (1 - wrong / position[mask].var(0, correction=0)).tolist()
    return Probe(*scores)


def probe_ceiling(size: int, reach: int) -> float:
    """R2 of the row among `size` rows for whoever sees a border `reach` tokens deep and nothing else: the
    outer rows are known, the others look alike, and their mean is the best guess."""
    row = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    unknown = row[reach : size - reach] if 2 * reach < size else row[:0]
    return float(1 - unknown.square().sum() / row.square().sum())


@torch.no_grad()
def patch_tokens(model: nn.Module, images: Tensor, block: int | None = None, batch: int = 64) -> Tensor:
    """(n, C, height, width) -> (n, N, D): the patch tokens that the head sees, or those after a block."""
    parts = [part.to(device_of(model)) for part in images.split(batch)]
    how = {"output_fmt": "NLC", "intermediates_only": True, "stop_early": True}
    with evaluating(model):
        if block is None:
            return torch.cat([model.forward_features(part)[:, model.num_prefix_tokens :] for part in parts])
        return torch.cat([model.forward_intermediates(part, indices=[block], **how)[0] for part in parts])


@torch.no_grad()
def attention_maps(model: nn.Module, images: Tensor) -> dict[int, Tensor]:
    """(n, C, height, width) -> for each block that has attention (n, h, T, T): how much each token, down, reads
    from each, across; every row sums to 1. Models of this package only."""
    found: dict[int, Tensor] = {}

    def keep(attention: nn.Module, arguments: tuple) -> None:
        found[number[attention]] = attention.weights(*arguments)

    number = {block.attn: i for i, block in enumerate(model.blocks) if block.attn is not None}
    hooks = [attention.register_forward_pre_hook(keep) for attention in number]
    try:
        with evaluating(model):
            model.forward_features(images.to(device_of(model)))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def control_images(images: Tensor, patch: int | Grid) -> dict[str, Tensor]:
    """(n, C, height, width) -> what a probe must be tried on: the "images", the mean of each as a "constant"
    image, "noise" with their mean and deviation in each channel, and their patches "shuffled"."""
    (p, q), generator = _pair(patch), torch.Generator().manual_seed(0)
    mean, deviation = images.mean((0, 2, 3), keepdim=True), images.std((0, 2, 3), keepdim=True)
    noise = torch.randn(images.shape, generator=generator).to(images)
    N = (images.shape[2] // p) * (images.shape[3] // q)
    order = torch.stack([torch.randperm(N, generator=generator) for _ in images])
    return {
        "images": images,
        "constant": images.mean((2, 3), keepdim=True).expand_as(images),
        "noise": mean + deviation * noise,
        "shuffled": shuffle_patches(images, (p, q), order),
    }
