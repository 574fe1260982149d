"""How often a model is right, image by image."""

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from cpvt.errors import DataError, typed
from cpvt.training.distributed import World


def autocast(device: str, precision: str) -> torch.autocast:
    """`precision` as in `RunConfig`: under bf16 matrix products are computed in half precision."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model with all its parts in evaluation mode; afterwards each is in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@typed
def correct(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """(n, C, height, width), (n,) -> (n,) booleans: the label has the largest logit."""
    return _hits(model, images, labels)[0][:, 0]  # as `accuracy`: topk ranks equal logits by k, too


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
    counts, classes = torch.zeros(5, dtype=torch.int64), 0
    with closing(batches) if isinstance(batches, Generator) else nullcontext():  # also after an error
        for images, labels in batches:
            if stop():
                break
            with autocast(str(images.device), precision):
                hits, classes = _hits(model, images, labels)
            seen, known = labels.new_tensor([len(labels), classes > 5]), (labels >= -1) & (labels < classes)
            counts += torch.stack([hits[:, 0].sum(), hits.any(-1).sum(), *seen, known.sum()]).cpu()
    if world:
        counts = world.sum(counts.to(world.device))
    top1, top5, images, many, known = counts.tolist()
    if known != images:
        words = f"{images - known} of {images} labels are of no class"
        raise DataError(f"{words}; expected 0 to {classes - 1}, or -1 where nothing is right")
    if not images and not stop():
        raise DataError("no images to evaluate on: give held-out data")
    top5 = {"top5": 100 * top5 / max(images, 1)} if many else {}
    return {"top1": 100 * top1 / max(images, 1), **top5, "images": images}


@torch.no_grad()
def _hits(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """-> (n, 5 or fewer) booleans: the label is the first, second, ... guess (with a NaN there is none), and the
    number of classes. 256 images at once. Raises DataError."""
    if not images.is_floating_point():
        raise DataError(f"images of {images.dtype}; expected floating point, normalised")
    if labels.shape != images.shape[:1]:
        raise DataError(f"{len(images)} images, labels of shape {tuple(labels.shape)}; expected one an image")
    images = images.to(next(model.parameters(), images).dtype)
    with evaluating(model):
        logits = torch.cat([model(x) for x in images.split(256)])
    C = logits.shape[-1]
    guesses = logits.topk(min(5, C), -1).indices
    return (guesses == labels[:, None]) & ~logits.isnan().any(-1, keepdim=True), C
