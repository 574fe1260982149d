"""What is decayed, how large a step is, which steps are skipped, and the running average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from cpvt.config import OptimConfig, TrainConfig, replace
from cpvt.model.encodings import PEG


def parameter_groups(model: nn.Module, weight_decay: float, decay_pegs: bool = True) -> list[dict]:
    """Two AdamW groups: matrices and kernels are decayed; biases, norms, tokens and position tables are not."""
    free = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
    if not decay_pegs:
        pegs = [(path, module) for path, module in model.named_modules() if isinstance(module, PEG)]
        free |= {f"{path}.{name}" for path, peg in pegs for name, _ in peg.named_parameters()}
    groups = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[parameter.ndim > 1 and name not in free].append(parameter)
    return [
        {"params": groups[True], "weight_decay": weight_decay},
        {"params": groups[False], "weight_decay": 0.0},
    ]


def learning_rate(step: int, optim: OptimConfig) -> float:
    """Linear over the warm-up up to the peak, then a cosine to the final rate, counted from step 0."""
    if step < optim.warmup_steps:
        return optim.warmup_lr + (optim.lr - optim.warmup_lr) * (step + 1) / optim.warmup_steps
    return _cosine(step / max(optim.steps, 1), optim)


def _cosine(share: float, optim: OptimConfig) -> float:
    return optim.min_lr + (optim.lr - optim.min_lr) * (1 + math.cos(math.pi * min(share, 1.0))) / 2


def resolved(config: TrainConfig, epoch_steps: int) -> TrainConfig:
    """The configuration with epochs turned into steps, a half-life into a decay, and the rate scaled."""
    optim = config.optim
    changes = {}
    if optim.epochs:
        changes = {"steps": optim.epochs * epoch_steps, "warmup_steps": optim.warmup_epochs * epoch_steps}
        changes |= {"epochs": 0, "warmup_epochs": 0}
    if optim.scale_lr:
        changes["rate"], changes["scale_lr"] = optim.lr * optim.global_batch_size / 512, False
    if optim.ema_half_life:
        changes["ema"] = 0.5 ** (1 / (optim.ema_half_life * epoch_steps))
        changes["ema_half_life"] = 0.0
    return replace(config, optim=replace(optim, **changes))


class Average:
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
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        kept = [p.detach().clone() for p in self.weights]
        torch._foreach_copy_(self.weights, self.average)
        torch._foreach_copy_(self.average, kept)


class Skips:
    """Steps without a finite loss and gradient, counted on the device: nothing waits for the answer.

    counts: skipped steps; of these, those that only fp16's loss scale caused; skipped ones in a row.
    """

    def __init__(self, device: str):
        self.counts = torch.zeros(3, dtype=torch.int64, device=device)

    def see(self, loss: Tensor, norm: Tensor, scaled: bool) -> Tensor:
        """Takes note of a step; -> 1.0 where it counts, 0.0 where it must be skipped, float32 on the device.

        `scaled`: whether the gradient came through a loss scale, and may have overflowed by it alone.
        """
        fine = torch.isfinite(loss) & torch.isfinite(norm)
        lost = (~fine).long()
        by_scale = lost * torch.isfinite(loss) if scaled else torch.zeros_like(lost)
        self.counts.copy_(
            torch.stack([self.counts[0] + lost, self.counts[1] + by_scale, (self.counts[2] + 1) * lost])
        )
        return fine.float()

    def read(self) -> dict[str, int]:
        """The counts, once the device has them: the only place that waits."""
        skipped, by_scale, in_a_row = self.counts.tolist()
        return {"skipped": skipped - by_scale, "scale_skips": by_scale, "in_a_row": in_a_row}
