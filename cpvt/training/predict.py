"""Single images -> their classes, and a picture of what the model attended to.

Letters: (h, w) pixels that a model sees, (H, W) grid of tokens, T all tokens.
"""

from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

import numpy
import torch
from PIL import Image
from torch import Tensor

from cpvt.config import replace
from cpvt.data.decode import decode_image, reason, regular
from cpvt.data.loader import evaluation_pixels
from cpvt.data.transforms import centre_resize, normalise
from cpvt.errors import ConfigError, DataError
from cpvt.training.checkpoint import Saved
from cpvt.training.evaluate import evaluating


def as_evaluated(saved: Saved, path: Path) -> Tensor:
    """An image file -> (3, h, w) uint8: what the model is shown of it in evaluation. Raises DataError."""
    data = replace(saved.config.data, image_size=saved.model.config.image_size)
    try:
        images = decode_image(regular(path).read_bytes())[None]
    except (DataError, OSError) as error:
        raise DataError(f"{path} cannot be read: {reason(error)}") from None
    images = centre_resize(images, data.held_shape) if data.store == "memory" else images
    return evaluation_pixels(images, data)[0]


@torch.no_grad()
def predict(saved: Saved, pixels: Tensor, top: int = 5) -> tuple[list[tuple[str, float]], Tensor | None]:
    """(3, h, w) uint8 -> the `top` best classes, each with its probability, and (H, W): how much the class token,
    or where there is none the mean patch, reads from each patch in the last block, mean over the heads.

    Classes whose names are not known are numbered. None in place of the map where no block has attention.
    """
    if pixels.dtype != torch.uint8 or pixels.ndim != 3:
        raise DataError(f"pixels are {pixels.dtype}, {tuple(pixels.shape)}; expected uint8, (3, h, w)")
    model, seen = saved.model, []
    images = normalise(pixels[None].float() / 255, saved.mean, saved.std).to(next(model.parameters()))
    attention = [block.attn for block in model.blocks if block.attn is not None][-1:]
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        for layer in attention:
            stack.enter_context(layer.register_forward_pre_hook(lambda _, arguments: seen.append(arguments)))
        best = model(images)[0].float().softmax(-1).topk(min(top, model.num_classes))
    names = saved.classes or [f"class {i}" for i in range(model.num_classes)]
    guesses = [(names[i], p) for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)]
    if not seen:
        return guesses, None
    weights, prefix, grid = attention[0].weights(*seen[0])[0].mean(0), model.num_prefix_tokens, seen[0][-1]
    reader = weights[0] if prefix else weights.mean(0)  # (T,)
    return guesses, reader[prefix:].unflatten(0, grid).cpu()


def draw_attention(path: Path, shown: Iterable[tuple[Tensor, Tensor | None]]) -> None:
    """Writes a row for each pair of pixels (3, h, w) and map (H, W): the image, and beside it the same, each patch
    as bright as it is attended to. Raises ConfigError where there are no maps."""
    rows = []
    for pixels, attended in shown:
        if attended is None:
            raise ConfigError(f"attention={str(path)!r}: no block of this model has attention; leave it out")
        image = pixels.permute(1, 2, 0).numpy()
        light = Image.fromarray((255 * attended / attended.max()).round().byte().numpy())
        light = numpy.asarray(light.resize(image.shape[1::-1], Image.Resampling.NEAREST)) / 255
        rows.append(numpy.concatenate([image, (image * light[:, :, None]).astype("uint8")], 1))
    Image.fromarray(numpy.concatenate(rows)).save(path)
