"""How a trained model is scored: on the synthetic tasks, at other sizes, its knowledge of position, under shifts.

A `score_...` of a whole run gives metrics by name (see `results.py`), the name of the data, and the SHA-256 of
what was evaluated on; the others give metrics alone. All of them work on the device that the model is on.

Letters: n images, C channels, p pixels a token, (H, W) grid of tokens.
"""

import dataclasses
import hashlib
import math
from collections.abc import Iterator
from statistics import fmean

import numpy
import torch
from torch import Tensor

from cpvt.config import DataConfig, Grid, replace
from cpvt.data.datasets import ImageDataset, ImageTensors, open_dataset
from cpvt.data.loader import ImageLoader, make_loader, open_split
from cpvt.data.synthetic import draw
from cpvt.data.transforms import area_resize, normalise
from cpvt.lab import probes
from cpvt.lab.photographs import DATASET, open_photographs, sha256_of_files
from cpvt.lab.probes import device_of
from cpvt.lab.results import fingerprint
from cpvt.model.encodings import PEG
from cpvt.model.vit import VisionTransformer
from cpvt.training.evaluate import accuracy, autocast, correct
from cpvt.training.train import TrainingRun

Score = tuple[dict[str, float], str, str]
Cache = dict | None  # of decoded images, from run to run: see `data.loader.open_split`


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


SHIFTS = {"window": range(1, 9), "circular": (1, 2, 3, 4, 6, 8)}  # pixels


def score_photographs(run: TrainingRun, cache: Cache = None, images: int = 1000) -> Score:
    """A row of `photographs`, from the 64-pixel originals; sizes by tokens a side, t of them trained.

    top1@6, top5@6 ...      whole images at five sizes; a table follows as its configuration says, and `/resample`,
                            `/rescale` as it could
    top1@14x8, top1@8x14    the middle band of an image, higher than wide, or wider than high
    top1@t/window           a window of the trained size in the middle of an image 8 pixels wider
    and what `score_shifts`, `score_map_errors`, `score_position` and `score_attention` say of `images`, 64, 256
    and 64 images at even steps
    """
    model, config = run.model, run.config.model
    held, precision = (
        open_photographs(run.config.data, "val", str(device_of(model)), cache),
        run.config.run.precision,
    )
    trained, p, metrics = config.image_size[0], config.patch_size, {}

    def seen(variant, size: Grid, index: Tensor | None = None, box=None) -> dict[str, float]:
        return accuracy(variant, photographs_at(held, size, index, box), precision=precision)

    for side in sizes_of(p):
        for suffix, variant in _variants(model, side):
            scores = seen(variant, (side, side))
            metrics |= {
                f"{name}@{side // p}{suffix}": scores[name] for name in ("top1", "top5") if name in scores
            }
    long = sizes_of(p)[-2]  # of originals of 64 pixels the middle band of that shape, the whole way across
    for size in ((long, trained), (trained, long)):
        high, wide = (64 * side / long for side in size)
        scores = seen(model, size, box=((64 - high) / 2, (64 - wide) / 2, high, wide))
        metrics[f"top1@{size[0] // p}x{size[1] // p}"] = scores["top1"]
    metrics |= score_shifts(model, held, at_even_steps(held, images), precision)

    def spread(count: int, size: Grid) -> Tensor:
        return torch.cat([x for x, _ in photographs_at(held, size, at_even_steps(held, count))])

    few, some, wider = (
        spread(64, config.image_size),
        spread(256, config.image_size),
        spread(64, (trained + p,) * 2),
    )
    wider = wider[:, :, p // 2 : p // 2 + trained]
    metrics |= score_map_errors(model, few, wider) | score_position(model, some) | score_attention(model, few)
    metrics = {
        name: value for name, value in metrics.items() if math.isfinite(value)
    }  # some have no interior
    return metrics, DATASET, sha256_of_files(run.config.data.root)


def sizes_of(patch: int) -> tuple[int, ...]:
    """The sides of test images in pixels, the second trained: 6 to 16 tokens of 4 pixels, 10 to 32 of 2."""
    return (24, 32, 48, 56, 64) if patch == 4 else (20, 28, 48, 56, 64)


def at_even_steps(held: ImageTensors, count: int) -> Tensor:
    """Indices of so many images, spread over the classes, which stand one after the other."""
    return torch.linspace(0, len(held.labels) - 1, min(count, len(held.labels))).long()


def photographs_at(
    held: ImageTensors, size: Grid, index: Tensor | None = None, box: tuple | None = None, batch: int = 250
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of held-out images at a size in pixels, normalised, and their labels: all or those of `index`, whole
    or a box (top, left, height, width) of them in their own pixels."""
    index = torch.arange(len(held.labels)) if index is None else index
    box = torch.tensor(box or (0, 0, *held.images.shape[2:]))
    for part in index.to(held.labels.device).split(batch):
        yield normalise(area_resize(held.images[part], box, size).float() / 255), held.labels[part]


def score_pilot(run: TrainingRun, cache: Cache = None) -> Score:
    """Of a run with `data.hold_out`: accuracy on the held-out part of the training images."""
    tokens = run.config.model.grid[0]
    metrics = {f"{name}@{tokens}": run.metrics[name] for name in ("top1", "top5") if name in run.metrics}
    part = f"{DATASET}, one of {run.config.data.hold_out} training images"
    return metrics, part, sha256_of_files(run.config.data.root)


def _variants(model: VisionTransformer, size: int) -> Iterator[tuple[str, VisionTransformer]]:
    """The model; at other sizes also with every other rule for a fixed table."""
    yield "", model
    encoding, trained = model.config.encoding, size == model.config.image_size[0]
    rules = {"sine": ("resample", "rescale"), "rotary": ("rescale",)}.get(encoding, ())
    for rule in () if trained else rules:
        other = VisionTransformer(replace(model.config, encoding=f"{encoding}(resize={rule!r})"))
        other.load_state_dict(model.state_dict())
        yield f"/{rule}", other.to(device_of(model)).eval()


def arrays_of(run: TrainingRun, cache: Cache = None) -> dict[str, Tensor]:
    """What is kept of a row of `photographs`.

    correct         one bit an image of the held-out ones at the trained size, in their order, eight to a byte, the
                    last filled up
    peg0 ...        (D, 1, k, k): trained kernels, in half precision
    table           (P + N, D): the trained table, prefix tokens first, in half precision
    attention       (blocks, H, W): how much the patch in the middle reads from each patch, mean over heads and 64
                    held-out images, in half precision; without blocks that see a smaller grid
    """
    model, device = run.model, str(device_of(run.model))
    held = open_photographs(run.config.data, "val", device, cache)
    with autocast(device, run.config.run.precision):
        hits = [correct(model, *batch).cpu() for batch in photographs_at(held, model.config.image_size)]
    kept = {"correct": torch.from_numpy(numpy.packbits(torch.cat(hits).numpy()))}
    pegs = [module for module in model.modules() if isinstance(module, PEG)]
    found = {f"peg{i}": peg.proj.weight for i, peg in enumerate(pegs)}
    if model.pos_embed is not None:
        found["table"] = model.pos_embed[0]
    (H, W), P = model.config.grid, model.num_prefix_tokens
    middle, even = P + H // 2 * W + W // 2, at_even_steps(held, 64)
    images = torch.cat([x for x, _ in photographs_at(held, model.config.image_size, even)])
    maps = [maps for maps in probes.attention_maps(model, images).values() if maps.shape[-1] == P + H * W]
    if maps:
        found["attention"] = torch.stack(
            [m[:, :, middle, P:].mean((0, 1)).unflatten(0, (H, W)) for m in maps]
        )
    return kept | {name: array.detach().cpu().half() for name, array in found.items()}


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


def score_map_errors(model: VisionTransformer, images: Tensor, scenes: Tensor) -> dict[str, float]:
    """How much the map of tokens differs from the shifted map when the image moves right by one token.

    map_error/circular/interior           after the last block, two tokens from the border or more; 1 is as large
                                          as the map itself
    map_error/circular/border             the same nearer to the border
    map_error/circular/interior/common    of the error the vector that all tokens of an image share, relative to
                                          that of the map
    map_error/circular/interior/pattern   what is left, relative to what is left of the map
    map_error/circular/interior/block0    as the first after each block; and `/block0/pattern`
    map_error/window/...                  the image is a frame that moves over `scenes`, which are a token wider

    Nothing where the grid shrinks on the way (a PEG without padding): a smaller map has no counterpart.
    """
    if _last_grid(model) != model.config.grid:
        return {}
    metrics, blocks = {}, (None, *range(model.config.depth))
    for kind, block in [("window", None), *(("circular", block) for block in blocks)]:

        def maps(moved: Tensor, block=block) -> Tensor:
            return probes.patch_tokens(model, moved, block).transpose(1, 2).unflatten(2, model.config.grid)

        scene = scenes if kind == "window" else images
        moved = probes.moved_maps(maps, scene, (0, 1), kind, 2, model.config.patch_size)
        for where, mask in (("interior", moved.inside), ("border", moved.outside)):
            name, parts = f"map_error/{kind}/{where}", probes.split_error(moved, mask)
            if block is None:
                metrics |= {
                    name: parts.total,
                    f"{name}/common": parts.common,
                    f"{name}/pattern": parts.pattern,
                }
            elif where == "interior":
                metrics |= {
                    f"{name}/block{block}": parts.total,
                    f"{name}/block{block}/pattern": parts.pattern,
                }
    return metrics


@torch.no_grad()
def score_shifts(
    model: VisionTransformer, held: ImageTensors, index: Tensor, precision="fp32"
) -> dict[str, float]:
    """How much answers change when an image moves by d pixels, both ways, across and down.

    kept/window1 ... 8      share of answers, in per cent, that are those to the image where it was, when a window
                            of the trained size moves over images 8 pixels wider
    kept/circular1 ... 8    the same when what leaves an image comes back on the other side
    moved/...               the change of the logits, relative to how they differ from their mean over images
    top1@t/window           accuracy of the window in the middle, and top1@t/circular4 ... of shifted images
    """
    size, p = model.config.image_size[0], model.config.patch_size
    parts = photographs_at(held, (size + 8, size + 8), index), photographs_at(held, (size, size), index)
    (scenes, labels), (images, _) = (map(torch.cat, zip(*part, strict=True)) for part in parts)

    def logits(x: Tensor) -> Tensor:
        with autocast(str(x.device), precision):
            return torch.cat([model(part).float() for part in x.split(250)])

    def right(found: Tensor) -> float:
        return 100 * (found.argmax(1) == labels).float().mean().item()

    places = [(4, d) for d in range(9)] + [(d, 4) for d in range(9) if d != 4]
    window = {
        place: logits(scenes[:, :, place[0] : place[0] + size, place[1] : place[1] + size])
        for place in places
    }
    still, rolled = logits(images), {}
    for d in SHIFTS["circular"]:
        ways = [images.roll(way, axis) for axis in (2, 3) for way in (d, -d)]
        rolled[d] = [(still, logits(moved)) for moved in ways]
    pairs = {"circular": rolled, "window": {}}
    for d in SHIFTS["window"]:
        ways = [((4, 0), (4, d)), ((4, 8), (4, 8 - d)), ((0, 4), (d, 4)), ((8, 4), (8 - d, 4))]
        pairs["window"][d] = [(window[a], window[b]) for a, b in ways]
    metrics, t = {f"top1@{size // p}/window": right(window[4, 4])}, size // p
    for kind, moved in pairs.items():
        for d, both in moved.items():
            kept = [(a.argmax(1) == b.argmax(1)).float().mean() for a, b in both]
            change = [(b - a).norm() / (a - a.mean(0)).norm().clamp(min=1e-9) for a, b in both]
            metrics[f"kept/{kind}{d}"] = 100 * torch.stack(kept).mean().item()
            metrics[f"moved/{kind}{d}"] = torch.stack(change).mean().item()
    metrics |= {f"top1@{t}/circular{d}": fmean(right(b) for _, b in rolled[d]) for d in rolled}
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
