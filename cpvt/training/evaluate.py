"""How often a model is right, image by image."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


@torch.no_grad()
def correct(model: nn.Module, images: Tensor, labels: Tensor, k: int = 1, batch: int = 256) -> Tensor:
    """(n, C, height, width), (n,) -> (n,) booleans: the label is among the k largest logits."""
    was_training = model.training
    model.eval()
    found = [
        (model(x).topk(min(k, model.num_classes), -1).indices == y[:, None]).any(-1)
        for x, y in zip(images.split(batch), labels.split(batch), strict=True)
    ]
    model.train(was_training)
    return torch.cat(found)


def accuracy(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """-> {"top1", "top5", "images"}: per cent right over all batches; top5 where there are more than 5 classes."""
    right1, right5, total = 0, 0, 0
    for images, labels in batches:
        right1 += int(correct(model, images, labels, 1).sum())
        right5 += int(correct(model, images, labels, 5).sum())
        total += len(labels)
    scores = {"top1": 100 * right1 / total, "images": total}
    if model.num_classes > 5:
        scores["top5"] = 100 * right5 / total
    return scores
