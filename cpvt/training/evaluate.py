"""How often a model is right, image by image."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from cpvt.training.distributed import World


@torch.no_grad()
def correct(model: nn.Module, images: Tensor, labels: Tensor, k: int = 1, batch: int = 256) -> Tensor:
    """(n, C, height, width), (n,) -> (n,) booleans: the label is among the k largest logits."""
    return _hits(model, images, labels, k, batch).any(-1)


@torch.no_grad()
def accuracy(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    world: World = World(),
    precision: torch.dtype | None = None,
    stop: Callable[[], bool] = bool,
) -> dict[str, float]:
    """-> {"top1", "top5", "images"}: per cent right over all batches; top5 where there are more than 5 classes.

    With many processes, each has its own batches, as many as it likes: right answers and images are counted and
    the counts added, so that no image is counted twice. `precision`: bfloat16 or float16 under autocast; None: as
    the weights are. `stop`: asked before each batch; once it says yes, the scores are those of a part, or none.
    """
    half = precision is not None and precision.itemsize == 2
    counts = torch.zeros(3, dtype=torch.int64)
    for images, labels in batches:
        if stop():
            break
        with torch.autocast(images.device.type, precision if half else None, enabled=half):
            hits = _hits(model, images, labels, 5)
        counts += torch.stack([hits[:, 0].sum(), hits.any(-1).sum(), labels.new_tensor(len(labels))]).cpu()
    top1, top5, images = world.sum(counts.to(world.device)).tolist()
    if not images and not stop():
        raise ValueError("no images to evaluate on: give held-out data")
    images = max(images, 1)
    scores = {"top1": 100 * top1 / images, "images": images}
    if model.num_classes > 5:
        scores["top5"] = 100 * top5 / images
    return scores


def _hits(model: nn.Module, images: Tensor, labels: Tensor, k: int, batch: int = 256) -> Tensor:
    """-> (n, k) booleans: the label is the first, second, ... k-th guess."""
    was_training = model.training
    model.eval()
    images = images.to(next(model.parameters(), images).dtype)
    guesses = [model(x).topk(min(k, model.num_classes), -1).indices for x in images.split(batch)]
    model.train(was_training)
    return torch.cat(guesses) == labels[:, None]
