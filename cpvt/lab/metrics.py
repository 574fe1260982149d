"""What is measured on a trained model of real images: accuracy at other sizes, place, shifts, attention.

Every function gives metrics by name, ready for a row (see `results.py`).

Letters: n images, C channels, p pixels a token, (H, W) grid of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import islice

import torch
from torch import Tensor

from cpvt.data.loader import Images, normalise, open_batches
from cpvt.data.resize import crop_resize
from cpvt.lab.probes import (
    Equivariance,
    attention_maps,
    control_images,
    equivariance_error,
    patch_tokens,
    position_probe,
)
from cpvt.lab.results import fingerprint
from cpvt.model.vit import VisionTransformer
from cpvt.training.evaluate import correct
from cpvt.training.train import Run


def first_images(batches: Images, count: int) -> tuple[Tensor, Tensor]:
    """-> the first `count` held-out images, normalised, and their labels, where the batches are."""
    parts = list(islice(batches.test(), -(-count // 256)))
    images, labels = (torch.cat(found)[:count] for found in zip(*parts, strict=True))
    return images, labels


def spread_images(batches: Images, count: int) -> tuple[Tensor, Tensor]:
    """The same of `count` held-out images at even steps: all classes have a part, in whatever order they stand."""
    images, labels = (torch.cat(found) for found in zip(*batches.test(), strict=True))
    index = torch.linspace(0, len(labels) - 1, min(count, len(labels))).long().to(labels.device)
    return images[index], labels[index]


def score_tuning(run: Run) -> tuple[dict[str, float], str, str]:
    """For a run with `data.hold_out`: -> its accuracy on the held-out part of the training images, the name of the
    data, and the SHA-256 of that part."""
    held = open_batches(run.config.data, 1, run.config.run.seed, train=False).held_out
    found = {f"top1@{run.config.model.grid[0]}": run.metrics["top1"], "images": run.metrics["images"]}
    part = f"{run.config.data.name}, one of {run.config.data.hold_out} training images"
    return found, part, fingerprint(held.images, held.labels)


@torch.no_grad()
def last_grid(model: VisionTransformer) -> tuple[int, int]:
    """(H, W) of the tokens after the last block: a PEG without padding has shrunk the grid."""
    config = model.config
    blank = torch.zeros(1, config.in_channels, *config.image_size).to(next(model.parameters()))
    (last,) = model.forward_intermediates(blank, indices=[config.depth - 1], intermediates_only=True)
    return tuple(last.shape[-2:])


def score_place(model: VisionTransformer, images: Tensor) -> dict[str, float]:
    """How well a linear probe reads a token's row and column off the last block: R2, 1 at best.

    position_r2/images, and on images that say nothing of place (see `probes.control_images`):
    position_r2/constant, /noise, /shuffled; each also as .../interior, away from the border.
    """
    metrics, grid = {}, last_grid(model)
    for name, pictures in control_images(images, model.config.patch_size).items():
        probe = position_probe(patch_tokens(model, pictures.to(images.device)), grid)
        metrics[f"position_r2/{name}"] = (probe.row + probe.column) / 2
        metrics[f"position_r2/{name}/interior"] = (probe.row_interior + probe.column_interior) / 2
    return _finite(metrics)


def score_maps(
    model: VisionTransformer, images: Tensor, scenes: Tensor | None = None, tokens: int = 2
) -> dict[str, float]:
    """How much the map of tokens differs from the shifted map when the image moves right by whole tokens.

    shift_error/circular          after the last block, three tokens from the border or more; 1 is as large as the
                                  map itself
    shift_error/circular/border   the same nearer to the border
    shift_error/circular/block0   the same as the first after each block
    shift_error/zero              black comes in
    shift_error/window            the image is a frame that moves over `scenes`, which are wider by `tokens`

    Nothing where the grid shrinks on the way (a PEG without padding): a smaller map has no counterpart.
    """
    if last_grid(model) != model.config.grid:
        return {}
    black = _black(images)

    def error(kind: str, pictures: Tensor, block: int | None = None) -> Equivariance:
        def maps(moved: Tensor) -> Tensor:
            found = patch_tokens(model, moved + black, block)
            return found.transpose(1, 2).unflatten(2, (-1, model.config.grid[1]))

        shift = {"shift": (0, tokens), "border": 3, "stride": model.config.patch_size}
        return equivariance_error(maps, pictures - black, kind=kind, **shift)

    given = {"circular": images, "zero": images} | ({} if scenes is None else {"window": scenes})
    metrics = {}
    for kind, pictures in given.items():
        found = error(kind, pictures)
        metrics |= {f"shift_error/{kind}": found.interior, f"shift_error/{kind}/border": found.border}
    for i in range(model.config.depth):
        metrics[f"shift_error/circular/block{i}"] = error("circular", images, i).interior
    return _finite(metrics)


def score_shifts(
    model: VisionTransformer, images: Tensor, labels: Tensor, pixels: Iterable[int] = (1, 2, 4, 6)
) -> dict[str, float]:
    """Accuracy on images that are moved left and right by so many pixels, black coming in.

    top1@14/shift2    per cent right, mean of both directions; /shift0 are the same images where they were
    same_class/shift2 share of answers, in per cent, that are those to the image where it was
    """
    grid, black = model.config.grid[0], _black(images)
    answers = {0: [_answers(model, images)]}
    for distance in pixels:
        answers[distance] = [
            _answers(model, _moved(images, signed, black)) for signed in (-distance, distance)
        ]
    metrics = {}
    for distance, both in answers.items():
        found = torch.stack(both)
        metrics[f"top1@{grid}/shift{distance}"] = 100 * (found == labels).float().mean().item()
        if distance:
            metrics[f"same_class/shift{distance}"] = 100 * (found == answers[0][0]).float().mean().item()
    return metrics


def _black(images: Tensor) -> Tensor:
    """-> (1, C, 1, 1): what black pixels are in normalised images."""
    return normalise(torch.zeros(1, images.shape[1], 1, 1)).to(images)


def _moved(images: Tensor, right: int, fill: Tensor) -> Tensor:
    """(n, C, height, width) moved right, or left where negative; `fill` (1, C, 1, 1) comes in."""
    out = images.roll(right, -1)
    columns = slice(0, right) if right > 0 else slice(images.shape[-1] + right, None)
    out[..., columns] = fill
    return out


@torch.no_grad()
def _answers(model: VisionTransformer, images: Tensor, batch: int = 256) -> Tensor:
    return torch.cat([model(part).argmax(-1) for part in images.split(batch)])


def score_attention(model: VisionTransformer, images: Tensor) -> dict[str, float]:
    """attention_distance/block0 ...: how far a patch reads, in tokens, mean over patches, heads and images.

    What a patch reads from prefix tokens is left out. Whoever reads from all 14 x 14 alike has 7.3. Blocks behind
    a PEG without padding, which see a smaller grid, are left out as well.
    """
    (H, W), P = model.config.grid, model.num_prefix_tokens
    places = torch.cartesian_prod(torch.arange(H), torch.arange(W)).to(images)
    distances = torch.cdist(places, places)
    metrics = {}
    for block, weights in attention_maps(model, images).items():
        patches = weights[:, :, P:, P:]
        if patches.shape[-1] != H * W:
            continue
        share = patches / patches.sum(-1, keepdim=True)
        metrics[f"attention_distance/block{block}"] = (share * distances).sum(-1).mean().item()
    return metrics


def score_oblong(model: VisionTransformer, batches: Images) -> dict[str, float]:
    """top1@14x28: accuracy on the middle band of the images, twice as wide as it is high.

    Held-out images of S x S pixels give a band of S / 2 x S, resized to the trained height and twice that width,
    so that an object keeps its tokens where the stored images are large enough.
    """
    held, size = batches.held_out, model.config.image_size[0]
    count, right = len(held), 0
    for part in torch.arange(count).split(256):
        pixels, labels = held.images[part], held.labels[part]
        S = pixels.shape[-1]
        band = torch.tensor([[S / 4, 0.0, S / 2, float(S)]], dtype=torch.float64).expand(len(part), 4)
        wide = crop_resize(pixels, band.contiguous(), (size, 2 * size), bound="image")
        device = next(model.parameters()).device
        right += correct(model, normalise(wide.to(device).float() / 255), labels.to(device)).sum().item()
    H, W = model.config.grid
    return {f"top1@{H}x{2 * W}": 100 * right / count}


def _finite(metrics: dict[str, float]) -> dict[str, float]:
    """Without what does not exist, such as the interior of a map that has none."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}
