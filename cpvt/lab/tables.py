"""Every table of the paper at 1:8: the rows as configurations, and how a trained row is scored.

The scale model sees ImageNet images at an eighth of their size (Tiny-ImageNet, 64 pixels) in tokens of 2 x 2
pixels: sizes of 20, 28, 48, 56 and 64 pixels give the grids of 160, 224, 384, 448 and 512 at 16 pixels a token.
Tests at larger sizes show real detail, never blur.

A row is a name and a configuration; the same name in another table is the same run, and is trained once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from tempfile import TemporaryDirectory

from cpvt.config import (
    AugmentConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
    parse_encoding,
    replace,
)
from cpvt.data.loader import open_batches
from cpvt.lab.metrics import (
    score_attention,
    score_maps,
    score_oblong,
    score_place,
    score_shifts,
    spread_images,
)
from cpvt.lab.results import fingerprint
from cpvt.lab.teacher import TEACHER
from cpvt.model.vit import VisionTransformer
from cpvt.training.checkpoint import save_model
from cpvt.training.distributed import Stopped
from cpvt.training.evaluate import accuracy
from cpvt.training.train import Run, train

PIXELS = 2  # a token, each way
SIZES = (20, 28, 48, 56, 64)  # of test images, in pixels; the second is trained
FINE_TUNED = 48  # pixels at which the rows of table "resolution" are trained a little longer
RATES = (7.5e-4, 1.5e-3, 3e-3)  # the grid of `tuning`, the same for every encoding
SEEDS = {"claim": (0, 1, 2, 3, 4), "core": (0, 1, 2), "extended": (0,)}


@dataclass(frozen=True)
class TableRow:
    """One line of a table.

    rank     "claim": behind a claim written down beforehand, five seeds; "core": three; "extended": one
    changes  of the scale model's configuration, by section: {"model": {...}, "augment": {...}}
    """

    table: str
    name: str
    encoding: str
    rank: str = "core"
    changes: dict[str, dict] = field(default_factory=dict)

    def config(self, seed: int = 0) -> TrainConfig:
        return changed(scale_model(self.encoding, seed), self.changes)


def scale_model(encoding: str, seed: int = 0) -> TrainConfig:
    """The 1:8 model that all rows share: six blocks of width 192, 14 x 14 tokens, 60 epochs.

    A recipe to begin with: its rate, length and augmentation are to be tuned on a held-out tenth of the training
    images, with the same grid for every encoding, before any row is recorded.
    """
    return TrainConfig(
        model=ModelConfig(
            image_size=(28, 28),
            patch_size=PIXELS,
            width=192,
            depth=6,
            heads=3,
            encoding=encoding,
            drop_path=0.1,
        ),
        data=DataConfig(name="tiny-imagenet", image_size=28, stored_size=64, crop_pct=1.0),
        augment=AugmentConfig(crop=True, crop_scale=(0.25, 1.0), hflip=0.5),
        optim=OptimConfig(
            global_batch_size=1024,
            epochs=60,
            lr=1.5e-3,
            warmup_epochs=5,
            min_lr=1e-5,
            label_smoothing=0.1,
            clip_grad=1.0,
        ),
        run=RunConfig(seed=seed, precision="bf16", compile="blocks", log_every=100),
    )


def changed(config: TrainConfig, changes: dict[str, dict]) -> TrainConfig:
    """The configuration with fields of its sections changed; names and types are checked."""
    sections = {name: replace(getattr(config, name), **values) for name, values in changes.items()}
    return replace(config, **sections)


# --------------------------------------------------------------------------- the rows

FIVE = "peg(positions=(0, 1, 2, 3, 4))"
ENCODINGS = {
    "none": ("none", "claim"),
    "learned": ("learned", "claim"),
    "sine": ("sine", "claim"),
    "relative": ("relative", "claim"),
    "relative, keys and values": ("relative(on='keys_values')", "extended"),
    "relative, bias": ("relative(on='bias')", "extended"),
    "relative, wrapped": ("relative(wrap=True)", "claim"),
    "one PEG": ("peg", "claim"),
    "five PEGs": (FIVE, "claim"),
    "four PEGs at one place": ("peg(repeat=4)", "core"),
    "learned + one PEG": ("learned + peg", "core"),
    "relative + one PEG": ("relative + peg", "extended"),
    "rotary": ("rotary", "claim"),
}
STEM, GAP = {"model": {"stem": "conv"}}, {"model": {"global_pool": "avg"}}
TWO_HEADS = {"model": {"distilled": True}}  # the control of TAUGHT: both heads learn the labels
TAUGHT = {**TWO_HEADS, "distill": {"teacher": TEACHER}}
BARE = {"model": {"mlp_only_blocks": 1}}
# Crops of 56 of 64 pixels, wherever they lie: pictures still move, and no object changes its size.
ONE_SCALE = (56 / 64) ** 2
NO_JITTER = {"augment": {"crop_scale": (ONE_SCALE, ONE_SCALE), "crop_ratio": (1.0, 1.0)}}


def rows() -> Iterator[TableRow]:
    """All rows, table by table. A name stands for one configuration, whatever table it is in."""
    for name, (encoding, rank) in ENCODINGS.items():
        yield TableRow("encodings", name, encoding, rank)
    for name, (encoding, _) in ENCODINGS.items():
        rank = "core" if name in ("none", "learned", "one PEG") else "extended"
        yield TableRow("encodings", f"{name}, with stem", encoding, rank, STEM)

    yield TableRow("placement", "one PEG", "peg", "claim")
    for place in (-1, 3, 4):
        yield TableRow("placement", f"one PEG at {place}", f"peg(positions=({place},))", "core")
    at_once = "peg(positions=(-1,), kernel=27, compute='matrix')"
    yield TableRow("placement", "kernel 27 at -1", at_once, "claim")
    yield TableRow("placement", "thirteen PEGs at -1", "peg(positions=(-1,), repeat=13)", "core")
    for name, encoding in (("none", "none"), ("one PEG at -1", "peg(positions=(-1,))"), ("one PEG", "peg")):
        yield TableRow("placement", f"{name}, block 0 without attention", encoding, "core", BARE)
    for count in (2, 3):
        places = tuple(range(count))
        yield TableRow("placement", f"{count} PEGs", f"peg(positions={places})", "core")
    yield TableRow("placement", "five PEGs", FIVE, "claim")
    yield TableRow("placement", "one PEG shared by five places", FIVE[:-1] + ", shared=True)", "extended")

    for name in ("none", "one PEG"):
        yield TableRow("parameters", name, *ENCODINGS[name])
    yield TableRow("parameters", "queries and keys only", "peg(on='queries_keys')", "core")
    yield TableRow("parameters", "random and frozen", "peg(frozen=True)", "claim")
    dense = "peg(positions=(0, 1, 2, 3, 4, 5), kernel=1, convolution='dense')"
    yield TableRow("parameters", "dense 1x1 in every block", dense, "claim")
    yield TableRow("parameters", "separable", "peg(convolution='separable')", "core")
    yield TableRow("parameters", "border without mixing", "peg(on='constant')", "claim")

    for padding in ("circular", "replicate", "reflect"):
        yield TableRow("padding", f"{padding} padding", f"peg(padding={padding!r})", "claim")
    yield TableRow("padding", "no padding", "peg(padding='none', skip=False)", "claim")
    yield TableRow("padding", "no skip", "peg(skip=False)", "core")
    yield TableRow("padding", "circular padding, no skip", "peg(padding='circular', skip=False)", "extended")
    for name in ("none", "one PEG"):
        yield TableRow("padding", name, *ENCODINGS[name])

    for name in ("none", "learned", "sine", "relative", "rotary", "one PEG", "five PEGs"):
        yield TableRow("resolution", name, *ENCODINGS[name])
    for name in ("none", "learned", "one PEG", "five PEGs"):
        encoding, _ = ENCODINGS[name]
        rank = "claim" if name == "none" else "core"
        yield TableRow("resolution", f"{name}, without scale jitter", encoding, rank, NO_JITTER)

    for name in ("none", "learned", "one PEG", "five PEGs"):
        encoding, rank = ENCODINGS[name]
        yield TableRow("global_pool", name, encoding, rank)
        yield TableRow("global_pool", f"{name}, GAP", encoding, "claim" if "PEG" in name else "core", GAP)
    for name in ("learned", "one PEG"):
        encoding, _ = ENCODINGS[name]
        yield TableRow("global_pool", f"{name}, two heads", encoding, "core", TWO_HEADS)
        rank = "claim" if name == "one PEG" else "core"
        yield TableRow("global_pool", f"{name}, distilled", encoding, rank, TAUGHT)

    for name in ("none", "learned", "one PEG"):
        encoding, _ = ENCODINGS[name]
        for epochs in (15, 30, 120):
            length = {"optim": {"epochs": epochs, "warmup_epochs": epochs // 12}}
            yield TableRow("length", f"{name}, {epochs} epochs", encoding, "extended", length)
        for images in (5_000, 15_000):
            # As long as 60 epochs of 50,000 images, the half of Tiny-ImageNet's classes; with all two hundred the
            # other rows take twice as many steps.
            length = {"epochs": 0, "warmup_epochs": 0, "steps": 2880, "warmup_steps": 240}
            part = {"data": {"limit": images}, "optim": length}
            yield TableRow("length", f"{name}, {images:,} images", encoding, "extended", part)


TABLES = tuple(dict.fromkeys(row.table for row in rows()))


def tuning() -> Iterator[tuple[str, TrainConfig]]:
    """The encodings behind claims at each rate of `RATES`, for a third of the length, on a held-out tenth of the
    training images; -> name of the row and its configuration: what the rate of `scale_model` is chosen from."""
    tuned = [name for name, (_, rank) in ENCODINGS.items() if rank == "claim"]
    for rate in RATES:
        for name in tuned:
            changes = {"data": {"hold_out": 10}, "optim": {"lr": rate, "epochs": 20, "warmup_epochs": 2}}
            yield f"{name}, rate {rate:g}", changed(scale_model(ENCODINGS[name][0]), changes)


# --------------------------------------------------------------------------- scoring


def score_scale(run: Run, images: int = 2000, tune: bool = False) -> tuple[dict[str, float], str, str]:
    """-> metrics, the name of the data, and the SHA-256 of the held-out images.

    top1@10 ... top1@32     at the five sizes, by tokens a side, whole images; a table follows as its configuration
                            says, and `/raw`, `/resample`, `/rescale` as it could; `/logn` with log-N attention,
                            whose factor is 1 at the trained size, so that training is the same
    top1@14x28              on a band twice as wide as it is high
    top1@24/tuned           after a short fine-tune at 24 tokens a side (`fine_tune`), with `tune`
    and what `scoring.py` names: for shifts on `images` of the held-out images, for place on 256, for maps and
    attention on 64, at even steps among them
    """
    config, device = run.config, str(next(run.model.parameters()).device)
    metrics: dict[str, float] = {}
    for size in SIZES:
        for suffix, model in _variants(run.model, size):
            data = replace(config.data, image_size=size)
            batches = open_batches(data, 1, config.run.seed, device, train=False)
            metrics[f"top1@{size // PIXELS}{suffix}"] = accuracy(model, batches.test())["top1"]
    held_out = open_batches(config.data, 1, config.run.seed, device, train=False)
    metrics |= score_oblong(run.model, held_out)
    if tune:
        tuned = fine_tune(run, FINE_TUNED)
        if tuned.interrupted:
            raise Stopped(tuned.interrupted)
        metrics[f"top1@{FINE_TUNED // PIXELS}/tuned"] = tuned.metrics["top1"]
    metrics |= score_shifts(run.model, *spread_images(held_out, images))
    sample, _ = spread_images(held_out, 256)
    few, _ = spread_images(held_out, 64)
    wider = replace(config.data, image_size=config.data.image_size + 2 * PIXELS)
    scenes, _ = spread_images(open_batches(wider, 1, config.run.seed, device, train=False), 64)
    metrics |= score_maps(run.model, few, scenes[:, :, PIXELS:-PIXELS])
    metrics |= score_place(run.model, sample) | score_attention(run.model, few)
    held = held_out.held_out
    return metrics, config.data.name, fingerprint(held.images.cpu(), held.labels.cpu())


def fine_tune(run: Run, size: int) -> Run:
    """Trains on at another image size: a twentieth of the steps, from a tenth of the rate downwards, no warm-up; a
    learned table is resampled first. Crops that would have to be enlarged are left out."""
    optim, crops = run.config.optim, run.config.augment.crop_scale
    detail = (size / run.config.data.stored_size) ** 2 if run.config.data.stored_size else 0.0
    with TemporaryDirectory() as folder:
        weights = Path(folder) / "model.safetensors"
        save_model(weights, run.model, run.config)
        config = changed(
            run.config,
            {
                "data": {"image_size": size},
                "augment": {"crop_scale": (max(crops[0], detail), max(crops[1], detail))},
                "optim": {"steps": max(optim.steps // 20, 1), "lr": optim.lr / 10, "warmup_steps": 0},
                "run": {"init": str(weights), "out": ""},
            },
        )
        return train(config)


def _variants(model: VisionTransformer, size: int) -> Iterator[tuple[str, VisionTransformer]]:
    """The model, and the same weights with log-N attention, and with every other rule for a fixed table."""
    config, text = model.config, model.config.encoding
    yield "", model
    if size == config.image_size[0]:
        return
    others = {"/logn": replace(config, logn_scale=True)}
    if text in ("sine", "rotary"):
        (part,) = parse_encoding(text)
        (rules,) = (f for f in fields(part) if f.name == "resize")
        for rule in ("raw", "resample", "rescale"):
            if rule in rules.type and rule != part.resize:
                others[f"/{rule}"] = replace(config, encoding=f"{text}(resize={rule!r})")
    for suffix, changes in others.items():
        other = VisionTransformer(changes)
        other.load_state_dict(model.state_dict())
        yield suffix, other.to(next(model.parameters()).device).eval()
