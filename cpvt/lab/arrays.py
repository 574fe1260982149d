"""Small arrays of trained models that are kept beside the rows: which images were right, kernels, tables.

One file an experiment, `data/results/NAME.safetensors`, under keys "ROW|SEED|ARRAY"; the row of that name and
seed in NAME.jsonl says how it came about.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cpvt.data.loader import open_batches
from cpvt.errors import ResultsError
from cpvt.lab.metrics import first_images
from cpvt.lab.probes import attention_maps
from cpvt.lab.results import find
from cpvt.model.encodings import PEG, LearnedTable
from cpvt.model.vit import VisionTransformer
from cpvt.training.evaluate import correct
from cpvt.training.train import Run

LARGEST = 200_000  # numbers; a larger weight is no small array


def arrays_of(run: Run, sample: Callable = first_images) -> dict[str, Tensor]:
    """What is kept of a run on real images; what has more than `LARGEST` numbers is left out.

    correct         one bit an image of the held-out ones, in their order, eight to a byte, the last filled up
    peg0 ...        (D, 1, k, k): trained kernels, in half precision
    table           (P + N, D): the trained table, prefix tokens first, in half precision
    attention       (blocks, H, W): how much the patch in the middle reads from each patch, mean over heads and 64
                    held-out images (`sample`), in half precision; blocks that see a smaller grid are left out
    """
    device = next(run.model.parameters()).device
    batches = open_batches(run.config.data, 1, run.config.run.seed, str(device), train=False)
    hits = torch.cat([correct(run.model, images, labels).cpu() for images, labels in batches.test()])
    kept = {"correct": torch.from_numpy(numpy.packbits(hits.numpy()))}
    modules = list(run.model.modules())
    kernels = [module.proj.weight for module in modules if isinstance(module, PEG)]
    found = {f"peg{i}": kernel for i, kernel in enumerate(kernels)}
    for module in modules:
        if isinstance(module, LearnedTable):
            found["table"] = module.pos_embed[0]
    images, _ = sample(batches, 64)
    found["attention"] = middle_attention(run.model, images)
    kept |= {name: array.detach().cpu().half() for name, array in found.items() if array.numel() <= LARGEST}
    return kept


def middle_attention(model: VisionTransformer, images: Tensor) -> Tensor:
    """-> (blocks, H, W): see `arrays_of`."""
    (H, W), P = model.config.grid, model.num_prefix_tokens
    middle = P + H // 2 * W + W // 2
    maps = [weights[:, :, middle, P:].mean((0, 1)) for weights in attention_maps(model, images).values()]
    return torch.stack([flat.unflatten(0, (H, W)) for flat in maps if len(flat) == H * W])


def keep_arrays(path: str | Path, row: str, seed: int, arrays: dict[str, Tensor]) -> None:
    """Adds the arrays of a row to the file, in the place of older ones; the file is replaced as a whole."""
    path = Path(path)
    held = load_file(path) if path.exists() else {}
    held |= {f"{row}|{seed}|{name}": array.contiguous() for name, array in arrays.items()}
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(held, beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def read_arrays(
    experiment: str, name: str, folder: str | Path = "data/results"
) -> dict[tuple[str, int], Tensor]:
    """-> the arrays called `name` of an experiment, by (row, seed); {} where none were kept. `correct` comes as it
    is kept; see `right`."""
    path = find(folder) / f"{experiment}.safetensors"
    if not path.exists():
        return {}
    found = {}
    for key, array in load_file(path).items():
        row, seed, what = key.split("|")
        if what == name:
            found[row, int(seed)] = array
    return found


def right(kept: Tensor, images: int) -> Tensor:
    """The array `correct` -> (images,) booleans. Raises ResultsError where it is of another number of images."""
    if len(kept) != -(-images // 8):
        raise ResultsError(
            f"{len(kept)} bytes of right and wrong for {images} images; expected {-(-images // 8)}"
        )
    return torch.from_numpy(numpy.unpackbits(kept.numpy(), count=images)).bool()


def gap_by_image(
    experiment: str, first: str, second: str, images: int, folder: str | Path = "data/results"
) -> tuple[float, float] | None:
    """-> by how many points of top-1 row `first` is ahead of `second`, and half of a 95 % interval over images.

    The mean over the seeds that both rows have is taken image by image, so that what is hard for both cancels; the
    interval says how far other images would move it, and nothing of other seeds. None without a common seed.
    """
    kept = read_arrays(experiment, "correct", folder)
    seeds = [seed for row, seed in kept if row == first and (second, seed) in kept]
    if not seeds:
        return None
    ahead = torch.stack(
        [right(kept[first, s], images).double() - right(kept[second, s], images).double() for s in seeds]
    ).mean(0)
    return 100 * ahead.mean().item(), 196 * ahead.std().item() / images**0.5
