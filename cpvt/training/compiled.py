"""torch.compile, which is used where it gives the gradients that the plain model gives. B: images."""

from functools import partial

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from cpvt.config import RunConfig
from cpvt.model.vit import VisionTransformer
from cpvt.proven import proved
from cpvt.training.evaluate import autocast
from cpvt.training.loss import TrainingLoss

PIECE = 64  # images whose gradients are computed at once without a compiler, which needs more memory


def compile_model(model: VisionTransformer, loss: TrainingLoss, run: RunConfig, B: int, scale: Tensor | None):
    """Compiles the model and its teacher, or its blocks, as `run.compile` asks. Where a step so compiled fails, or
    has other gradients, blocks are tried; where these fail, too, nothing is compiled.

    B, scale    images of a micro-batch, and what their branches are multiplied by, as in training
    """
    models, weight = [m for m in (model, loss.teacher) if m is not None], next(model.parameters())
    for way in ("model", "blocks") if run.compile == "model" else ("blocks",):
        for module in models if way == "model" else model.blocks:
            module.compile()  # in place: the parameters keep their names
        name = f"compiled {way}, encoding {model.config.encoding}, {run.precision}, on {weight.device}"
        instead = "compiled blocks" if way == "model" else "nothing is compiled"
        if proved(name, partial(compiled_fault, model, loss, run.precision, B, scale), instead):
            return
        for module in (module for model in models for module in model.modules()):
            module._compiled_call_impl = None
        torch._dynamo.reset()


def compiled_fault(model: VisionTransformer, loss: TrainingLoss, precision: str, B: int, scale) -> str:
    """What is wrong with the gradients of the model as it is compiled, beside those without, on noise."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    like = {"device": parameters[0].device, "dtype": parameters[0].dtype}
    dice, sides = torch.Generator(like["device"]).manual_seed(0), model.config.image_size
    images = torch.randn(B, model.config.in_channels, *sides, generator=dice, **like)
    labels = torch.zeros(B, dtype=torch.int64, device=like["device"])

    def gradients(part: slice) -> list[Tensor]:
        some, own = images[part], None if scale is None else scale[..., part]
        with autocast(str(some.device), precision):
            value = loss(model.train()(some, own), some, labels[part]) * (len(some) / B)
        return torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)

    found = gradients(slice(None))
    with torch.compiler.set_stance("force_eager"):
        parts = (gradients(slice(i, i + PIECE)) for i in range(0, B, PIECE))
        exact = [*next(parts)]
        for part in parts:
            torch._foreach_add_(exact, part)
    little = 0.01 * get_total_norm(exact)  # some are zero but for rounding, as that of the keys' bias
    error = max(float((a - b).norm() / (b.norm() + little)) for a, b in zip(found, exact, strict=True))
    bound = 0.1 if precision == "bf16" else 1e-3
    return "" if error < bound else f"a gradient is off by {error:.2g}, expected below {bound:g}"
