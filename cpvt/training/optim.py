"""What is decayed, how large a step is, which steps are skipped, and the running average of the weights."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpvt.config import OptimConfig, TrainConfig, replace
from cpvt.model.encodings import PEG


def param_groups(model: nn.Module, weight_decay: float, decay_pegs: bool = True) -> list[dict]:
    """AdamW's groups, by timm: biases, norms and what the model's `no_weight_decay` names are not decayed."""
    from timm.optim import param_groups_weight_decay  # two seconds, which not every command should pay

    free = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
    for path, module in model.named_modules():
        if isinstance(module, PEG) and not decay_pegs:
            free |= {f"{path}.{name}" for name, _ in module.named_parameters()}
    return param_groups_weight_decay(model, weight_decay, no_weight_decay_list=free)


def freeze(model: nn.Module, blocks: int) -> None:
    """The first `blocks` blocks, what the encoding does behind them, and all that stands before them are not
    trained, tables that blocks share among it; -1: nothing but the head is."""
    if blocks:
        from timm.models import group_parameters

        # 0: before block 0; i + 1: block i
        layer = group_parameters(model, model.group_matcher(), reverse=True)
        for name, parameter in model.named_parameters():
            before_head = not name.startswith("head")
            if before_head and (blocks < 0 or (layer[name] <= blocks and not name.startswith("norm."))):
                parameter.requires_grad_(False)


class _AddUpBias(torch.autograd.Function):
    """(B, T, D), (D,) -> the first unchanged; the bias gets each image's sum of the gradient, these added up."""

    @staticmethod
    def forward(ctx, out: Tensor, bias: Tensor) -> Tensor:
        ctx.kind = bias.dtype
        return out.view_as(out)

    @staticmethod
    def backward(ctx, g: Tensor):
        return g, g.sum(1, dtype=ctx.kind).sum(0)


class _ImagewiseLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        if x.ndim < 3 or not torch.is_grad_enabled():
            return super().forward(x)
        return _AddUpBias.apply(F.linear(x, self.weight, self.bias.detach()), self.bias)


def add_up_biases(model: nn.Module) -> None:
    """Linear layers add up their bias's gradient image by image first. torch.compile fuses that sum into the
    kernel that makes the incoming gradient, which is then not read again: a twentieth of a step's bytes."""
    for layer in model.modules():
        if type(layer) is nn.Linear and layer.bias is not None:
            layer.__class__ = _ImagewiseLinear  # under the same names, with the same weights and hooks


def learning_rate(step: int, optim: OptimConfig) -> float:
    """Linear over the warm-up up to the peak, then a cosine to the final rate, counted from step 0."""
    if step < optim.warmup_steps:
        return optim.warmup_lr + (optim.lr - optim.warmup_lr) * (step + 1) / optim.warmup_steps
    done = min(step / max(optim.steps, 1), 1.0)
    return optim.min_lr + (optim.lr - optim.min_lr) * (1 + math.cos(math.pi * done)) / 2


def resolve(config: TrainConfig, epoch_steps: int) -> TrainConfig:
    """The configuration with epochs turned into steps, a half-life into a decay, and the learning rate scaled."""
    optim = config.optim
    if optim.epochs:
        warmup = optim.warmup_epochs * epoch_steps or optim.warmup_steps
        steps = {"steps": optim.epochs * epoch_steps, "warmup_steps": warmup}
        optim = replace(optim, **steps, epochs=0, warmup_epochs=0)
    if optim.scale_lr:
        optim = replace(optim, lr=optim.lr * optim.global_batch_size / 512, scale_lr=False)
    if optim.ema_half_life:
        decay = 0.5 ** (1 / (optim.ema_half_life * epoch_steps))
        optim = replace(optim, ema_decay=decay, ema_half_life=0.0)
    return replace(config, optim=optim)


class EMA:
    """A running average of a model's trained parameters: average += (1 - decay) (weights - average)."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.weights = [p for p in model.parameters() if p.requires_grad]
        self.average = [p.detach().clone() for p in self.weights]

    @torch.no_grad()
    def update(self, taken: Tensor) -> None:
        """`taken`: 1.0 where the step was taken, 0.0 where it was skipped; a scalar on the device."""
        change = torch._foreach_sub(self.weights, self.average)
        torch._foreach_mul_(change, taken.to(change[0].dtype) * (1 - self.decay))
        torch._foreach_add_(self.average, change)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the average for weights, as long as this lasts."""
        weights = [p.detach() for p in self.weights]
        kept = [p.clone() for p in weights]
        torch._foreach_copy_(weights, self.average)
        try:
            yield
        finally:
            torch._foreach_copy_(weights, kept)


class SkipCounter:
    """Steps without a finite loss and gradient, counted on the device: who reads the counts waits, nobody else."""

    def __init__(self, device: str):
        self.counts = torch.zeros(2, dtype=torch.int64, device=device)  # all of them; the last ones in a row

    def see(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Takes note of a step; -> 1.0 where it counts, 0.0 where it must be skipped, float32 on the device."""
        fine = torch.isfinite(loss) & torch.isfinite(norm)
        lost = (~fine).long()
        self.counts.copy_(torch.stack([self.counts[0] + lost, (self.counts[1] + 1) * lost]))
        return fine.float()
