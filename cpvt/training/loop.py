"""The loop: data, forward, backward, step, log, save, in that order."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from cpvt.config import ConfigError, TrainConfig, to_json
from cpvt.data.loader import open_batches
from cpvt.model.vit import VisionTransformer
from cpvt.training.checkpoint import save_model
from cpvt.training.evaluate import accuracy
from cpvt.training.optim import learning_rate, parameter_groups


@dataclass
class Run:
    """What a training run leaves: the model in evaluation mode, its configuration, its log, its result."""

    model: VisionTransformer
    config: TrainConfig
    history: list[dict] = field(default_factory=list)  # one entry a logged step
    metrics: dict[str, float] = field(default_factory=dict)
    fingerprint: str = ""  # of the training images
    seconds: float = 0.0
    steps: int = 0  # taken; fewer than configured after an early stop


def train(config: TrainConfig, report: Callable[[dict], None] | None = None) -> Run:
    """Trains as configured and evaluates on the held-out split.

    The model's classes and image size are taken from the data. `report` is called with each log entry.
    Raises ConfigError or DataError, before anything is written, where the configuration cannot be run.
    """
    run, optim = config.run, config.optim
    device = pick_device(run.device)
    batches = open_batches(config.data, optim.batch, run.seed, device)
    config = replace(
        config,
        model=replace(config.model, num_classes=batches.num_classes, image_size=batches.image_size),
    )
    torch.manual_seed(run.seed)
    model = VisionTransformer(config.model).to(device)
    forward = torch.compile(model) if run.compile else model
    autocast = torch.autocast(device, torch.bfloat16) if run.precision == "bf16" else nullcontext()
    optimiser = torch.optim.AdamW(parameter_groups(model, optim.weight_decay), lr=optim.rate, fused=True)
    log = _Log(run.out, config)
    result, losses, started = Run(model, config, fingerprint=batches.fingerprint), [], time.perf_counter()

    model.train()
    for step in range(optim.steps):
        images, labels = batches.batch(step)
        with autocast:
            loss = _loss(forward(images), labels, optim.smoothing)
        loss.backward()
        if optim.clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip)
        rate = learning_rate(step, optim)
        for group in optimiser.param_groups:
            group["lr"] = rate
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        result.steps = step + 1

        last = step + 1 == optim.steps
        if optim.stop_loss and step >= 20:
            last = last or float(torch.stack(losses[-20:]).mean()) < optim.stop_loss
        if (step + 1) % run.log_every == 0 or last:
            mean = float(torch.stack(losses[-run.log_every :]).mean())
            if mean != mean:
                raise FloatingPointError(
                    f"step {step + 1}: the loss is not a number; lower the rate ({optim.rate})"
                )
            result.history.append({"step": step + 1, "loss": round(mean, 4), "rate": rate})
            log.write(result.history[-1])
            if report:
                report(result.history[-1])
        if last:
            break

    model.eval()
    result.metrics = accuracy(model, batches.test())
    result.seconds = time.perf_counter() - started
    log.write({"step": result.steps, **result.metrics, "seconds": round(result.seconds, 1)})
    if run.out:
        save_model(Path(run.out) / "model.safetensors", model, config)
    return result


def _loss(logits: Tensor | tuple[Tensor, Tensor], labels: Tensor, smoothing: float) -> Tensor:
    """Cross entropy; with two heads and no teacher, both learn from the labels."""
    heads = logits if isinstance(logits, tuple) else (logits,)
    return sum(F.cross_entropy(head.float(), labels, label_smoothing=smoothing) for head in heads) / len(
        heads
    )


def pick_device(name: str) -> str:
    """ "auto" -> "cuda" where there is one, else "cpu". Raises ConfigError for a device that is not here."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise ConfigError(f"device={name!r}; expected 'auto', 'cpu' or 'cuda'")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device='cuda', but PyTorch sees no GPU here; use device='cpu' or 'auto'")
    return name


class _Log:
    """Appends entries to `out`/log.jsonl, the configuration first; does nothing without a folder."""

    def __init__(self, out: str, config: TrainConfig):
        self.path = Path(out) / "log.jsonl" if out else None
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps({"config": json.loads(to_json(config))}) + "\n")

    def write(self, entry: dict) -> None:
        if self.path:
            with open(self.path, "a") as file:
                file.write(json.dumps(entry) + "\n")
