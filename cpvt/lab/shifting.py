"""The picture moves: what of a model's tokens moves along, and what of its answer stays. No drawing here.

A *shift* T moves a picture right, and down, by so many pixels; a map of tokens F follows it exactly where
F(TX) = T F(X). The live views of the pages compute the same (book/_static/live/live.js).
Everything is computed in float64, where rounding is about 1e-15 and a change below `EXACT` is none.

Letters: p side of a patch in pixels, (H, W) grid, D width, K classes. Images are (3, height, width) in [0, 1].
"""

import copy
from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from cpvt.data.transforms import normalise
from cpvt.model.vit import VisionTransformer

EXACT = 1e-12


# --------------------------------------------------------------------------- pictures that move


def slide_on_ring(image: Tensor, pixels: int, down: int = 0) -> Tensor:
    """The picture, so many pixels to the right; what leaves on one side comes back on the other."""
    return image.roll((down, pixels), (-2, -1))


def slide_window(scene: Tensor, pixels: int, side: int, down: int = 0) -> Tensor:
    """A square of a wider scene, in its middle at 0; the content moves right, and new content comes in."""
    top, left = (scene.shape[-2] - side) // 2 - down, (scene.shape[-1] - side) // 2 - pixels
    return scene[..., top : top + side, left : left + side]


def place_on(ground: Tensor, subject: Tensor, left: int, top: int | None = None) -> Tensor:
    """The ground with the subject on it, halfway down if no `top` is given."""
    (height, width), out = subject.shape[-2:], ground.clone()
    top = (ground.shape[-2] - height) // 2 if top is None else top
    out[..., top : top + height, left : left + width] = subject
    return out


# --------------------------------------------------------------------------- what a model makes of them


def exact_copy(model: VisionTransformer) -> VisionTransformer:
    """The same model in float64 and in evaluation."""
    return copy.deepcopy(model).double().eval()


@torch.no_grad()
def token_maps(model: VisionTransformer, image: Tensor) -> list[Tensor]:
    """-> maps of patch tokens (D, H, W): before block 0, and after each block and the PEG behind it."""
    x, grid = model.embed(_batch(model, image))
    maps = [(x, grid)]
    for i in range(model.config.depth):
        x, grid = model.run_block(i, x, grid)
        maps.append((x, grid))
    return [_as_map(model, x, grid) for x, grid in maps]


@torch.no_grad()
def added_map(model: VisionTransformer, image: Tensor) -> Tensor:
    """-> (D, H, W): what the encoding adds to the patch tokens before block 0 and after it, together."""
    patches, grid = model.patch_embed(_batch(model, image))
    x, grid = model.embed(_batch(model, image))
    added = x[:, model.num_prefix_tokens :] - patches
    before = model.blocks[0](x, model.encoding, 0, grid)
    after, _ = model.encoding.encode(0, before, grid, model.pos_embed)
    return _as_map(model, added, grid, 0) + _as_map(model, after - before, grid)


@torch.no_grad()
def probabilities(model: VisionTransformer, images: Sequence[Tensor]) -> Tensor:
    """-> (len(images), K): the model's answers."""
    return torch.cat([model(_batch(model, image)).softmax(-1) for image in images])


# --------------------------------------------------------------------------- did it move along?


def shift_change(
    before: Tensor, after: Tensor, pixels: int, patch: int, wrap: bool = True, down: int = 0
) -> Tensor:
    """Maps (D, H, W) of a picture and of the same moved by `pixels` -> (H, W): how far each token is from what it
    would be if the map had moved along, relative to the size of a token; 0 exactly where it did.

    A shift by a fraction of a token is held against the nearest whole ones. Where new content came in
    (`wrap=False`) there is nothing to compare: NaN.
    """
    near = [sorted({shift // patch, -(-shift // patch)}) for shift in (down, pixels)]
    changes = [_change(before, after, s, wrap) for s in product(*near)]
    return min(changes, key=lambda c: float(c.nan_to_num().square().sum()))


def _change(before: Tensor, after: Tensor, shift: tuple[int, int], wrap: bool) -> Tensor:
    """`shift`: whole tokens, down and right."""
    expected = before.roll(shift, (-2, -1))
    size = before.square().sum(0).mean().sqrt().clamp(min=1e-30)
    change = (after - expected).norm(dim=0) / size
    change = torch.where(change < EXACT, 0.0, change)
    if not wrap:
        for axis, s in enumerate(shift):
            gone = slice(0, s) if s > 0 else slice(s, None) if s else slice(0, 0)
            change[(slice(None),) * axis + (gone,)] = float("nan")
    return change


class View(NamedTuple):
    """What a model makes of a picture that moved; see `shifted_view`."""

    added: Tensor  # (D, H, W): what the encoding adds to the moved picture
    map: Tensor  # (D, H, W): its tokens after the block
    change: Tensor  # (H, W): that map against the map of the unmoved picture, moved; 0: exact
    probabilities: Tensor  # (K,)


def shifted_view(
    model: VisionTransformer, image: Tensor, moved: Tensor, pixels: int, block: int, wrap=True, down: int = 0
) -> View:
    """A model (an `exact_copy`), a picture, the same moved right by `pixels`; after `block`, -1: before 0."""
    before, after = (token_maps(model, x)[block + 1] for x in (image, moved))
    change = shift_change(before, after, pixels, model.config.patch_size, wrap, down)
    return View(added_map(model, moved), after, change, probabilities(model, [moved])[0])


def _batch(model: VisionTransformer, image: Tensor) -> Tensor:
    return normalise(image.to(next(model.parameters()).dtype))[None]


def _as_map(model: VisionTransformer, x: Tensor, grid, prefix: int | None = None) -> Tensor:
    """(1, P + N, D) -> (D, H, W); `prefix`: how many tokens come first, P unless given."""
    patches = x[0, model.num_prefix_tokens if prefix is None else prefix :]
    return patches.T.unflatten(1, grid)
