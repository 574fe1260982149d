"""How often a model is right, image by image."""

from collections.abc import Callable, Generator, Iterable
from contextlib import closing, nullcontext

import torch
from torch import Tensor, nn

from cpvt.errors import DataError, typed
from cpvt.training.distributed import World


def autocast(device: str, precision: str) -> torch.autocast:
    """`precision` as in `RunConfig`: under bf16 matrix products are computed in half precision."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16")


@typed
def correct(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """(n, C, height, width), (n,) -> (n,) booleans: the label has the largest logit."""
    return _hits(model, images, labels, 5)[:, 0]  # as `accuracy`: topk ranks equal logits by k, too


@typed
def accuracy(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    world: World | None = None,
    precision: str = "fp32",
    stop: Callable[[], bool] = bool,
) -> dict[str, float]:
    """-> {"top1", "top5", "images"}: per cent right over all batches; top5 where there are more than 5 classes.

    Every process of `world` has batches of its own; right answers and images are counted and the counts added, so
    that no image counts twice. `stop`: asked before each batch; after a yes the scores are those of a part.
    """
    counts = torch.zeros(3, dtype=torch.int64)
    with closing(batches) if isinstance(batches, Generator) else nullcontext():  # also after an error
        for images, labels in batches:
            if stop():
                break
            with autocast(str(images.device), precision):
                hits = _hits(model, images, labels, 5)
            images = labels.new_tensor(len(labels))
            counts += torch.stack([hits[:, 0].sum(), hits.any(-1).sum(), images]).cpu()
    if world:
        counts = world.sum(counts.to(world.device))
    top1, top5, images = counts.tolist()
    if not images and not stop():
        raise DataError("no images to evaluate on: give held-out data")
    top5 = {"top5": 100 * top5 / max(images, 1)} if model.num_classes > 5 else {}
    return {"top1": 100 * top1 / max(images, 1), **top5, "images": images}


@torch.no_grad()
def _hits(model: nn.Module, images: Tensor, labels: Tensor, k: int) -> Tensor:
    """-> (n, k) booleans: the label is the first, second, ... k-th guess. 256 images at once. Raises DataError."""
    if not images.is_floating_point():
        raise DataError(f"images of {images.dtype}; expected floating point, normalised")
    C = model.num_classes
    if labels.shape != images.shape[:1] or not ((labels >= -1) & (labels < C)).all():
        shown = f"{len(images)} images, labels {str(labels.tolist())[:60]}"
        raise DataError(f"{shown}; expected one an image, from 0 to {C - 1}, or -1 where nothing is right")
    was_training = model.training
    model.eval()
    images = images.to(next(model.parameters(), images).dtype)
    guesses = [model(x).topk(min(k, model.num_classes), -1).indices for x in images.split(256)]
    model.train(was_training)
    return torch.cat(guesses) == labels[:, None]
