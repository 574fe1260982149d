"""Photographs for two cores: Tiny-ImageNet's first hundred classes, prepared once; and baselines on them.

50,000 images to train on and 5,000 held out, 64 x 64 pixels. Every size that a model sees is made from these by
area averaging: a larger image shows more detail, and never blur.

Letters: n images, K classes, S side in pixels.
"""

import ctypes
import fcntl
import hashlib
import os
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from cpvt.config import DataConfig
from cpvt.data.datasets import ImageDataset, ImageTensors, load_tensors, open_dataset
from cpvt.data.shards import new_folder
from cpvt.data.transforms import area_resize, normalise
from cpvt.errors import DataError
from cpvt.lab.results import Result, append, check_writable, commit, recorded, results_folder

NAME, CLASSES, SIDE = "tiny-imagenet", 100, 64
DATASET = "tiny-imagenet, its first 100 classes"
TRAINED_ON = ("photographs", "pilot", "precision")  # the experiments with these images
COUNTS = {"train": 500, "val": 50}  # images a class
FILE = "tiny-imagenet-100-classes.safetensors"  # below the folder of the images: what `prepare` writes


def whole_split(root: str | Path, split: str) -> ImageDataset:
    """The images of the first hundred classes, class by class, each by name: the same for the archive as published
    and for folders of classes. Raises DataError where one is missing."""
    found = open_dataset(NAME, split, root)
    if len(found.classes) < CLASSES:
        words = f"{len(found.classes)} classes; expected the {CLASSES} or 200 of Tiny-ImageNet"
        raise DataError(f"{Path(root) / 'tiny-imagenet-200'} has {words}: unpack all of it")
    names = [found.path(i).name for i in range(len(found))]
    order = sorted(
        (i for i, label in enumerate(found.labels.tolist()) if label < CLASSES),
        key=lambda i: (int(found.labels[i]), names[i]),
    )
    chosen = found.select(order)
    for label, count in enumerate(torch.bincount(chosen.labels, minlength=CLASSES).tolist()):
        if count != COUNTS[split]:
            where = f"{Path(root) / 'tiny-imagenet-200' / split}, class {found.classes[label]}"
            raise DataError(f"{where}: {count} images; expected {COUNTS[split]}: unpack all of it again")
    return ImageDataset(NAME, split, found.classes[:CLASSES], chosen.items, chosen.labels)


def prepare(root: str | Path) -> Path:
    """Decodes all images into one file beside them, once; -> its path. One process does it, others wait."""
    root = Path(root).expanduser()
    path = root / FILE
    if path.exists():
        return path
    with new_folder(root), open(root / f".{FILE}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            digest, parts, classes = hashlib.sha256(), {}, ()
            for split in COUNTS:
                try:
                    images = whole_split(root, split)
                except DataError:
                    os.unlink(lock.name)  # what is refused leaves nothing behind
                    raise
                for i in range(len(images)):
                    digest.update(images.read(i))
                decoded, classes = load_tensors(images, SIDE), images.classes
                parts |= {split: decoded.images, f"{split}/labels": decoded.labels}
            beside = path.with_name(f".{FILE}.{os.getpid()}")
            save_file(parts, beside, metadata={"sha256": digest.hexdigest(), "classes": " ".join(classes)})
            os.replace(beside, path)
    return path


@cache
def sha256_of_files(root: str | Path) -> str:
    """Over the bytes of all JPEG files of both splits, in order: which images these are, whoever decodes them."""
    with safe_open(prepare(root), "pt") as file:
        return file.metadata()["sha256"]


def open_photographs(data: DataConfig, split: str, device="cpu", cache: dict | None = None) -> ImageTensors:
    """One split, or with `hold_out` a part of the training images, as `loader.open_split`. On a CPU the pixels are
    the file's own pages: processes share them."""
    cache, key = {} if cache is None else cache, (data.root, split, data.hold_out, str(device))
    if key not in cache:
        path, source = prepare(data.root), "train" if data.hold_out else split
        with safe_open(path, "pt") as file:
            classes = tuple(file.metadata()["classes"].split())
        held = load_file(path)
        images, labels = held[source], held[f"{source}/labels"]
        if data.hold_out:
            held_out = torch.arange(len(labels)) % data.hold_out == 0
            chosen = held_out if split == "val" else ~held_out
            images, labels = images[chosen], labels[chosen]
        cache[key] = ImageTensors(images.to(device), labels.to(device), classes)
    return cache[key]


def check_images(root: str | Path, folder: str | Path | None = None) -> None:
    """Raises DataError where the images are not those that recorded rows were trained on."""
    check_writable(folder)
    found, names = sha256_of_files(root or DataConfig.root), TRAINED_ON
    paths = [results_folder(folder) / f"{name}.jsonl" for name in names]
    for result in (result for path in paths if path.exists() for result in recorded(path.stem, folder)):
        if result.dataset_sha256 != found:
            words = f"other images (SHA-256 {found[:12]}) than those of {result.experiment}, {result.label}"
            raise DataError(
                f"{root or DataConfig.root}: {words}: give their folder, or another one for the results"
            )


def one_thread() -> None:
    """One thread for this process, so that two run side by side. Memory that is freed stays with it (glibc's
    mallopt, where that is the C library): a step asks for the same again, and new pages cost a part of it."""
    torch.set_num_threads(1)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    for option, value in ((-4, 0), (-1, 1 << 30), (-2, 1 << 28)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
        if mallopt:
            mallopt(option, value)


# --------------------------------------------------------------------------- what a model has to be better than


def pixels(images: Tensor, side: int) -> Tensor:
    """(n, 3, 64, 64) uint8 -> (n, 3 S S) float32, normalised."""
    whole = torch.tensor((0, 0, *images.shape[2:]))
    parts = (normalise(area_resize(part, whole, (side, side)).float() / 255) for part in images.split(500))
    return torch.cat([part.flatten(1) for part in parts])


def softmax_regression(
    x: Tensor, y: Tensor, test: Tensor, lr: float, weight_decay: float, epochs: int = 20, seed: int = 0
) -> Tensor:
    """(n, P), (n,) -> the predicted classes of `test`: one linear map, AdamW, a cosine down to zero."""
    torch.manual_seed(seed)
    weight = torch.zeros(x.shape[1], CLASSES, requires_grad=True)
    bias = torch.zeros(CLASSES, requires_grad=True)
    optimizer = torch.optim.AdamW([weight, bias], lr=lr, weight_decay=weight_decay)
    steps = epochs * -(-len(x) // 500)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for index in torch.randperm(len(x)).split(500):
            optimizer.zero_grad()
            F.cross_entropy(x[index] @ weight + bias, y[index]).backward()
            optimizer.step()
            schedule.step()
    return (test @ weight + bias).detach().argmax(1)


def nearest_neighbour(x: Tensor, y: Tensor, test: Tensor) -> Tensor:
    """-> for each of `test` the class of the image whose pixels differ least, by the sum of squares."""
    length = x.square().sum(1)
    return torch.cat([y[(length - 2 * part @ x.T).argmin(1)] for part in test.split(250)])


LINEAR_GRID = [(lr, decay) for lr in (3e-5, 1e-4, 3e-4) for decay in (0.1, 1.0, 10.0)]


def _percent(found: Tensor, labels: Tensor) -> float:
    return 100 * (found == labels).double().mean().item()


def _tuned_regression(x: Tensor, y: Tensor, test: Tensor, labels: Tensor) -> tuple[float, dict]:
    """Learning rate and weight decay are chosen on a held-out tenth of the training images."""
    held = torch.arange(len(y)) % 10 == 0
    tried = {o: _percent(softmax_regression(x[~held], y[~held], x[held], *o), y[held]) for o in LINEAR_GRID}
    best = max(tried, key=tried.get)
    chosen = {"lr": best[0], "weight_decay": best[1], "held_out_top1": tried[best]}
    return _percent(softmax_regression(x, y, test, *best), labels), chosen


# name -> pixels and labels to train on, pixels and labels to test on -> top-1 in percent, configuration
BASELINES = {
    "chance": lambda x, y, test, labels: (100 / CLASSES, {}),
    "nearest neighbour": lambda x, y, test, labels: (_percent(nearest_neighbour(x, y, test), labels), {}),
    "softmax regression": _tuned_regression,
}


def measure_baselines(root: str = "", folder=None, report: Callable = lambda result, left: None) -> None:
    """What needs no transformer: chance, the nearest neighbour and softmax regression, on pixels; minutes."""
    root, version = root or DataConfig.root, commit()
    check_writable(folder)
    path = results_folder(folder) / "baselines.jsonl"
    done = [result.columns for result in recorded("baselines", folder)] if path.exists() else []
    planned = [{"baseline": name, "grid": grid} for grid in (8, 14) for name in BASELINES]
    missing = [columns for columns in planned if columns not in done]
    for left, columns in reversed([*enumerate(reversed(missing))]):
        started, side = time.perf_counter(), {8: 32, 14: 28}[columns["grid"]]
        train, val = (open_photographs(DataConfig(root=root), split) for split in COUNTS)
        x, test = pixels(train.images, side), pixels(val.images, side)
        top1, config = BASELINES[columns["baseline"]](x, train.labels, test, val.labels)
        result = Result(
            experiment="baselines",
            columns=columns,
            scale="minutes",
            dataset=DATASET,
            dataset_sha256=sha256_of_files(root),
            config={"side": side, **config},
            metrics={f"top1@{columns['grid']}": top1},
            seconds=round(time.perf_counter() - started, 1),
            device="cpu",
            cpvt_commit=version,
        )
        append(result, folder)
        report(result, left)
