"""How a trained model is scored: on the synthetic tasks, at other sizes, its knowledge of position, under shifts.

A `score_...` of a whole run gives metrics by name (see `results.py`), the name of the data, and the SHA-256 of
what was evaluated on; the others give metrics alone. All of them work on the device that the model is on.

Letters: n images, C channels, p pixels a token, (H, W) grid of tokens.
"""

import dataclasses
import hashlib
import math
from collections.abc import Iterator
from itertools import islice

import numpy
import torch
from torch import Tensor

from cpvt.config import DataConfig, Grid, replace
from cpvt.data.datasets import ImageDataset, open_dataset
from cpvt.data.loader import ImageLoader, make_loader, open_split
from cpvt.data.synthetic import draw
from cpvt.data.transforms import normalise, resize
from cpvt.lab import probes
from cpvt.lab.probes import device_of
from cpvt.lab.results import fingerprint
from cpvt.model.encodings import PEG
from cpvt.model.vit import VisionTransformer
from cpvt.training.evaluate import accuracy, correct
from cpvt.training.train import TrainingRun

Score = tuple[dict[str, float], str, str]
Cache = dict | None  # of decoded images, from run to run: see `data.loader.open_split`
SIZES = (20, 28, 48, 56, 64)  # of test images at 1:8, in pixels; the second is trained


def held_out(run: TrainingRun, cache: Cache = None, **changes) -> ImageLoader:
    """The held-out images of a run, as they are or with `changes` of their DataConfig, on its model's device."""
    data, device = replace(run.config.data, **changes), str(device_of(run.model))
    return make_loader(data, seed=run.config.run.seed, device=device, train=False, cache=cache)


def _digest(loader: ImageLoader) -> str:
    return fingerprint(loader.val_set.images, loader.val_set.labels)


def held_out_images(loader: ImageLoader, count: int, spread: bool = False) -> tuple[Tensor, Tensor]:
    """-> the first `count` held-out images, normalised, and their labels; `spread`: at even steps."""
    parts = loader.eval_batches() if spread else islice(loader.eval_batches(), -(-count // 256))
    images, labels = (torch.cat(found) for found in zip(*parts, strict=True))
    if not spread:
        return images[:count], labels[:count]
    index = torch.linspace(0, len(labels) - 1, min(count, len(labels))).long().to(labels.device)
    return images[index], labels[index]


def selected(images: ImageDataset, classes: int) -> ImageDataset:
    """The images of the first `classes` classes alone, in the order of their names."""
    chosen = images.select((images.labels < classes).nonzero().flatten())
    return dataclasses.replace(chosen, classes=chosen.classes[:classes])


def first_classes(data: DataConfig, *, classes: int, **options) -> ImageLoader:
    """`make_loader` with the images of the first `classes` classes alone."""
    return make_loader(data, **options, open_split=lambda *which: selected(open_split(*which), classes))


# --------------------------------------------------------------------------- whole runs


def score_synthetic(run: TrainingRun, cache: Cache = None, images: int = 256) -> Score:
    """Accuracy in percent, by distance (`/d3`); for *what* on the side that bars were trained on (`/trained`), on
    the other (`/unseen`), and for the pair that was trained everywhere (`/diagonals`)."""
    data, device = run.config.data, device_of(run.model)
    top1 = "top1@" + "x".join(map(str, dict.fromkeys(data.grid)))
    seen: list[Tensor] = []

    def percent(split: str, **options) -> float:
        where = {"grid": data.grid, "seed": run.config.run.seed, "split": split}
        sample = draw(data.name, range(images), **where, **options)
        seen.append(sample.images)
        right = correct(run.model, normalise(sample.images).to(device), sample.labels.to(device))
        return 100 * right.float().mean().item()

    metrics = {top1: percent("val")}
    if data.name == "what":
        metrics[f"{top1}/trained"] = metrics[top1]
        metrics[f"{top1}/unseen"] = percent("test")
        metrics[f"{top1}/diagonals"] = percent("val", pair="diagonals")
    else:
        distances = range(data.grid[0] // 2) if data.name == "where" else range(2, data.grid[1] - 4)
        metrics |= {f"{top1}/d{d}": percent("val", distances=(d,)) for d in distances}
    return metrics, data.name, fingerprint(*seen)


def score_pipeline(run: TrainingRun, cache: Cache = None, *, classes: int) -> Score:
    """top-1 and top-5 on the held-out images of the first `classes`; in any order, for the digest."""
    data, tokens = run.config.data, run.config.model.grid[0]
    held_out = selected(open_dataset(data.name, "val", data.root), classes)
    files = (b"%d\n" % label + held_out.read(i) for i, label in enumerate(held_out.labels.tolist()))
    digest = hashlib.sha256("".join(sorted(hashlib.sha256(file).hexdigest() for file in files)).encode())
    metrics = {f"{name}@{tokens}": run.metrics[name] for name in ("top1", "top5") if name in run.metrics}
    metrics |= {"images": run.metrics["images"], "unusable_images": run.faults}
    return metrics, f"{data.name}, its first {classes} classes", digest.hexdigest()


def score_tuning(run: TrainingRun, cache: Cache = None) -> Score:
    """For a run with `data.hold_out`: accuracy on the held-out part of the training images."""
    metrics = {f"top1@{run.config.model.grid[0]}": run.metrics["top1"], "images": run.metrics["images"]}
    part = f"{run.config.data.name}, one of {run.config.data.hold_out} training images"
    return metrics, part, _digest(held_out(run, cache))


def score_fashion(run: TrainingRun, cache: Cache = None, images: int = 1000) -> Score:
    """top1@14 on all test images, and what `_score_images` says of the first `images`."""
    loader = held_out(run, cache)
    metrics = {"top1@14": run.metrics["top1"], **_score_images(run.model, loader, images)}
    return metrics, run.config.data.name, _digest(loader)


def score_table_row(run: TrainingRun, cache: Cache = None, images: int = 2000) -> Score:
    """A row of the tables at 1:8.

    top1@10 ... top1@32     at the five sizes, by tokens a side, whole images; a table follows as its configuration
                            says, and `/resample`, `/rescale` as it could
    top1@14x28              on a band twice as wide as it is high
    and what `_score_images` says of `images` at even steps
    """
    model, pixels, size = run.model, run.config.model.patch_size, run.config.data.image_size
    metrics, cache = {}, {} if cache is None else cache  # images are decoded once for all sizes
    for side in SIZES:
        for suffix, variant in _variants(model, side):
            scores = accuracy(variant, held_out(run, cache, image_size=side).eval_batches())
            metrics[f"top1@{side // pixels}{suffix}"] = scores["top1"]
    loader = held_out(run, cache)
    metrics |= score_oblong(model, loader)
    wider, _ = held_out_images(held_out(run, cache, image_size=size + 2 * pixels), 64, spread=True)
    metrics |= _score_images(model, loader, images, True, wider[:, :, pixels:-pixels])
    return metrics, run.config.data.name, _digest(loader)


def _score_images(model, loader: ImageLoader, count: int, spread=False, scenes=None) -> dict[str, float]:
    """Shifts on `count` held-out images, position on 256, maps and attention on 64; NaN (no interior) left out."""
    few, some = (held_out_images(loader, number, spread)[0] for number in (64, 256))
    metrics = score_shifts(model, *held_out_images(loader, count, spread)) | score_position(model, some)
    metrics |= score_maps(model, few, scenes) | score_attention(model, few)
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def _variants(model: VisionTransformer, size: int) -> Iterator[tuple[str, VisionTransformer]]:
    """The model; at other sizes also with every other rule for a fixed table."""
    yield "", model
    encoding, trained = model.config.encoding, size == model.config.image_size[0]
    rules = {"sine": ("resample", "rescale"), "rotary": ("rescale",)}.get(encoding, ())
    for rule in () if trained else rules:
        other = VisionTransformer(replace(model.config, encoding=f"{encoding}(resize={rule!r})"))
        other.load_state_dict(model.state_dict())
        yield f"/{rule}", other.to(device_of(model)).eval()


def arrays_of(run: TrainingRun, cache: Cache = None, spread: bool = False) -> dict[str, Tensor]:
    """What is kept of a run on real images.

    correct         one bit an image of the held-out ones, in their order, eight to a byte, the last filled up
    peg0 ...        (D, 1, k, k): trained kernels, in half precision
    table           (P + N, D): the trained table, prefix tokens first, in half precision
    attention       (blocks, H, W): how much the patch in the middle reads from each patch, mean over heads and 64
                    held-out images, in half precision; without blocks that see a smaller grid
    """
    model, loader = run.model, held_out(run, cache)
    hits = torch.cat([correct(model, images, labels).cpu() for images, labels in loader.eval_batches()])
    pegs = [module for module in model.modules() if isinstance(module, PEG)]
    found = {f"peg{i}": peg.proj.weight for i, peg in enumerate(pegs)}
    if model.pos_embed is not None:
        found["table"] = model.pos_embed[0]
    (H, W), P = model.config.grid, model.num_prefix_tokens
    middle = P + H // 2 * W + W // 2
    maps = probes.attention_maps(model, held_out_images(loader, 64, spread)[0]).values()
    maps = [weights[:, :, middle, P:].mean((0, 1)) for weights in maps]
    found["attention"] = torch.stack([flat.unflatten(0, (H, W)) for flat in maps if len(flat) == H * W])
    kept = {name: array.detach().cpu().half() for name, array in found.items()}
    return {"correct": torch.from_numpy(numpy.packbits(hits.numpy())), **kept}


# --------------------------------------------------------------------------- parts of a score


def _last_grid(model: VisionTransformer) -> Grid:
    """(H, W) of the tokens after the last block: a PEG without padding has shrunk the grid."""
    config = model.config
    with torch.no_grad():
        image = torch.zeros(1, config.in_channels, *config.image_size).to(next(model.parameters()))
        x, grid = model.embed(image)
        for i in range(config.depth):
            x, grid = model.run_block(i, x, grid)
    return grid


def score_position(model: VisionTransformer, images: Tensor) -> dict[str, float]:
    """How well a linear probe reads a token's row and column off the last block: position_r2/images, and on images
    that say nothing of position /constant, /noise, /shuffled; each also as .../interior, off the border."""
    metrics, grid = {}, _last_grid(model)
    for name, control in probes.control_images(images, model.config.patch_size).items():
        probe = probes.position_probe(probes.patch_tokens(model, control), grid)
        metrics[f"position_r2/{name}"] = (probe.row + probe.column) / 2
        metrics[f"position_r2/{name}/interior"] = (probe.row_interior + probe.column_interior) / 2
    return metrics


def score_maps(model: VisionTransformer, images: Tensor, scenes: Tensor | None = None) -> dict[str, float]:
    """How much the map of tokens differs from the shifted map when the image moves right by two tokens.

    shift_error/circular          after the last block, three tokens from the border or more; 1 is as large as the
                                  map itself
    shift_error/circular/border   the same nearer to the border
    shift_error/circular/block0   the same as the first after each block
    shift_error/zero              black comes in
    shift_error/window            the image is a frame that moves over `scenes`, which are two tokens wider

    Nothing where the grid shrinks on the way (a PEG without padding): a smaller map has no counterpart.
    """
    if _last_grid(model) != model.config.grid:
        return {}
    black = normalise(torch.zeros_like(images[:1, :, :1, :1]))

    def error(kind: str, scene: Tensor, block: int | None = None) -> probes.Equivariance:
        def maps(moved: Tensor) -> Tensor:
            found = probes.patch_tokens(model, moved + black, block)
            return found.transpose(1, 2).unflatten(2, (-1, model.config.grid[1]))

        return probes.equivariance_error(maps, scene - black, (0, 2), kind, 3, model.config.patch_size)

    kinds = {"circular": images, "zero": images} | ({} if scenes is None else {"window": scenes})
    metrics = {}
    for kind, scene in kinds.items():
        found = error(kind, scene)
        metrics |= {f"shift_error/{kind}": found.interior, f"shift_error/{kind}/border": found.border}
    for i in range(model.config.depth):
        metrics[f"shift_error/circular/block{i}"] = error("circular", images, i).interior
    return metrics


@torch.no_grad()
def score_shifts(model: VisionTransformer, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy on images that are moved left and right by 1 to 6 pixels, black coming in.

    top1@14/shift2    per cent right, mean of both directions; /shift0 are the same images where they were
    same_class/shift2 share of answers, in per cent, that are those to the image where it was
    """
    top1, black = f"top1@{model.config.grid[0]}", normalise(torch.zeros_like(images[:1, :, :1, :1]))

    def answers(right: int) -> Tensor:  # to images moved right, or left where negative
        moved = images.roll(right, -1)
        if right:
            moved[..., slice(0, right) if right > 0 else slice(right, None)] = black
        return torch.cat([model(part).argmax(-1) for part in moved.split(256)])

    still = answers(0)
    metrics = {f"{top1}/shift0": 100 * (still == labels).float().mean().item()}
    for distance in (1, 2, 4, 6):
        found = torch.stack([answers(-distance), answers(distance)])
        metrics[f"{top1}/shift{distance}"] = 100 * (found == labels).float().mean().item()
        metrics[f"same_class/shift{distance}"] = 100 * (found == still).float().mean().item()
    return metrics


def score_attention(model: VisionTransformer, images: Tensor) -> dict[str, float]:
    """attention_distance/block0 ...: how far a patch reads, in tokens, mean over patches, heads and images.

    Whoever reads from all 14 x 14 alike has 7.3. Prefix tokens are left out, and blocks that see a smaller grid.
    """
    (H, W), P = model.config.grid, model.num_prefix_tokens
    positions = torch.cartesian_prod(torch.arange(H), torch.arange(W)).to(images)
    distances = torch.cdist(positions, positions)
    metrics = {}
    for block, weights in probes.attention_maps(model, images).items():
        patches = weights[:, :, P:, P:]
        if patches.shape[-1] != H * W:
            continue
        share = patches / patches.sum(-1, keepdim=True)
        metrics[f"attention_distance/block{block}"] = (share * distances).sum(-1).mean().item()
    return metrics


def score_oblong(model: VisionTransformer, loader: ImageLoader) -> dict[str, float]:
    """top1@14x28: accuracy on the middle band of the images, twice as wide as it is high.

    Held-out images of S x S pixels give a band of S / 2 x S, resized to the trained height and twice that width.
    """
    held, size, right = loader.val_set, model.config.image_size[0], []
    for part in torch.arange(len(held.labels)).split(256):
        pixels, labels = held.images[part], held.labels[part].to(device_of(model))
        S = pixels.shape[-1]
        band = resize(pixels[:, :, S // 4 : S - S // 4], (size, 2 * size)).to(device_of(model))
        right.append(correct(model, normalise(band / 255), labels))
    H, W = model.config.grid
    return {f"top1@{H}x{2 * W}": 100 * torch.cat(right).double().mean().item()}
