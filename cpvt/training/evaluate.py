"""How often a model is right, image by image."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


@torch.no_grad()
def correct(model: nn.Module, images: Tensor, labels: Tensor, k: int = 1, batch: int = 256) -> Tensor:
    """(n, C, height, width), (n,) -> (n,) booleans: the label is among the k largest logits."""
    return _hits(model, images, labels, k, batch).any(-1)


@torch.no_grad()
def accuracy(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """-> {"top1", "top5", "images"}: per cent right over all batches; top5 where there are more than 5 classes."""
    hits = torch.cat([_hits(model, images, labels, 5).cpu() for images, labels in batches])
    scores = {"top1": 100 * int(hits[:, 0].sum()) / len(hits), "images": len(hits)}
    if model.num_classes > 5:
        scores["top5"] = 100 * int(hits.any(-1).sum()) / len(hits)
    return scores


def _hits(model: nn.Module, images: Tensor, labels: Tensor, k: int, batch: int = 256) -> Tensor:
    """-> (n, k) booleans: the label is the first, second, ... k-th guess."""
    was_training = model.training
    model.eval()
    guesses = [model(x).topk(min(k, model.num_classes), -1).indices for x in images.split(batch)]
    model.train(was_training)
    return torch.cat(guesses) == labels[:, None]
