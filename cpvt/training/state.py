"""All that a step changes: weights, optimiser, average, loss scale, counts. What is saved, and nothing else."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from cpvt.config import TrainConfig, from_json, to_json
from cpvt.errors import ConfigError
from cpvt.model.vit import VisionTransformer
from cpvt.training.checkpoint import differences
from cpvt.training.optim import Average, Skips, parameter_groups


class State:
    """The state of a run between two steps. Order and rate are functions of the step and need no state."""

    def __init__(self, model: VisionTransformer, config: TrainConfig, device: str, fingerprint: str = ""):
        """`fingerprint`: of the data that the run is on."""
        optim = config.optim
        self.model, self.config, self.steps, self.fingerprint = model, config, 0, fingerprint
        groups = parameter_groups(model, optim.weight_decay, optim.decay_pegs)
        self.optimiser = torch.optim.AdamW(groups, lr=optim.lr, fused=True)
        self.parameters = [p for group in groups for p in group["params"]]
        self.average = Average(model, optim.ema_decay) if optim.ema_decay else None
        self.scaler = torch.amp.GradScaler(
            torch.device(device).type, enabled=config.run.precision == "fp16", growth_interval=1000
        )
        self.skips = Skips(device)
        self.losses: list[Tensor] = []  # since the last entry of the log
        self.recent: deque[Tensor] = deque(maxlen=20)  # the last losses, for an early stop
        self.best = 0.0  # top-1 in per cent, over the evaluations so far

    def update(self, loss: Tensor, rate: float) -> Tensor:
        """One step with the gradients at hand; -> their norm. Skipped on the device if anything is not finite.

        `loss`: the mean over all processes, so that all of them skip the same steps.
        """
        fp16 = self.scaler.is_enabled()
        if fp16:
            self.scaler.unscale_(self.optimiser)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        taken = self.skips.see(loss, norm, scaled=fp16)
        if clip := self.config.optim.clip_grad:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, clip, norm)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        # The fused optimiser leaves everything as it is where `found_inf` is 1: nobody has to wait for it. The
        # scaler only learns whether its scale was too large; what is skipped is one decision, made above.
        self.optimiser.grad_scale, self.optimiser.found_inf = None, 1 - taken
        self.optimiser.step()
        if fp16:
            self.scaler.update()
        self.optimiser.zero_grad(set_to_none=True)
        if self.average:
            self.average.update(taken)
        self.losses.append(loss)
        self.recent.append(loss)
        self.steps += 1
        return norm

    def saved(self) -> dict:
        """-> tensors, numbers and text alone, which `torch.load(weights_only=True)` reads back."""
        return {
            "config": to_json(self.config),
            "fingerprint": self.fingerprint,
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "average": self.average.average if self.average else [],
            "scaler": self.scaler.state_dict(),
            "skips": self.skips.counts,
            "losses": torch.stack(self.losses) if self.losses else torch.zeros(0),
            "recent": torch.stack(list(self.recent)) if self.recent else torch.zeros(0),
            "best": self.best,
        }

    def restore(self, steps: int, saved: dict) -> None:
        """Raises ConfigError, before anything is changed, where `saved` belongs to another run."""
        found = differences(self.config, from_json(TrainConfig, saved["config"]), self.fingerprint)
        if saved["fingerprint"] != self.fingerprint:
            found.append("data: other training images there than here")
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise ConfigError(
                f"run.out={self.config.run.out!r} holds another run ({'; '.join(found[:3])}{more}): "
                "give it the same options, or another folder"
            )
        self.model.load_state_dict(saved["model"])
        self.optimiser.load_state_dict(saved["optimiser"])
        if self.average:
            torch._foreach_copy_(self.average.average, saved["average"])
        self.scaler.load_state_dict(saved["scaler"])
        self.skips.counts.copy_(saved["skips"])
        device = self.skips.counts.device
        self.losses = list(saved["losses"].to(device))
        self.recent.extend(saved["recent"].to(device))
        self.best, self.steps = saved["best"], steps
