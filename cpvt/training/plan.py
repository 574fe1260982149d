"""What a run is going to do, in a dozen lines, before it does it."""

from __future__ import annotations

import time

import torch

from cpvt.config import TrainConfig
from cpvt.data.loader import Batch
from cpvt.model.encodings import PEG
from cpvt.training.optim import learning_rate
from cpvt.training.setup import Session


def describe(session: Session, seconds: float | None = None) -> list[str]:
    """-> lines, a word and what it stands for. `seconds`: those of a step, as `time_step` measured them."""
    state, batches, world = session.state, session.batches, session.world
    config, stream = session.config, batches.stream
    optim, model, run = config.optim, state.model, config.run
    height, width = config.model.image_size
    pegs = sum(isinstance(module, PEG) for module in model.modules())
    free = [sum(p.numel() for p in group["params"]) for group in state.optimiser.param_groups]
    share = stream.batch // world.size
    epochs = optim.steps / stream.steps
    lines = [
        f"model     {config.model.encoding}, {_count(sum(p.numel() for p in model.parameters()), 'parameter')}, "
        f"{_count(pegs, 'PEG')}, {height} x {width} pixels, "
        f"{config.model.grid[0]} x {config.model.grid[1]} tokens",
        f"decay     {free[0]:,} parameters at {optim.weight_decay:g}, {free[1]:,} not decayed",
        f"data      {config.data.name}: {_count(stream.images, 'image')}, {batches.num_classes} classes; "
        f"an epoch is {_count(stream.steps, 'step')}, {stream.steps * stream.batch:,} samples of "
        f"{_count(stream.distinct, 'distinct image')}",
        f"batch     {stream.batch} = {_count(world.size, 'process')} x {_count(batches.parts, 'micro-batch')} x "
        f"{share // batches.parts}" + (f", mixed in groups of {stream.group}" if stream.group > 1 else ""),
        f"augment   {_augmentation(config)}",
        f"rate      {_rates(config, stream.steps)}",
        f"length    {optim.steps:,} steps, {epochs:.4g} epochs, {run.precision}"
        + ("" if run.compile == "off" else f", {run.compile} compiled")
        + (", deterministic" if run.deterministic else "")
        + (f", average of the weights with decay {optim.ema_decay:.8g} a step" if optim.ema_decay else ""),
    ]
    if config.distill.teacher:
        d = config.distill
        lines.append(f"teacher   {d.teacher}, {d.kind}, alpha {d.alpha:g}, tau {d.tau:g}")
    if run.out:
        lines.append(f"keeps     {run.keep_checkpoints} checkpoints, log and model in {run.out}")
    if seconds:
        left = optim.steps - state.steps
        lines.append(
            f"time      {seconds:.3g} s a step ({stream.batch / seconds:,.0f} images/s) for model"
            + (" and teacher" if config.distill.teacher else "")
            + f" alone, so {_duration(left * seconds)} for {left:,} steps if the data keeps up"
        )
    return lines


def time_step(session: Session, repeated_aug: int = 3) -> float:
    """Seconds of a step on images of noise, without the optimiser. It leaves no trace in the run's state."""
    batches, device = session.batches, session.world.device
    size = batches.stream.batch // session.world.size // batches.parts
    noise = torch.randn(size, 3, *batches.image_size, device=device)
    batch = Batch(noise, torch.zeros(size, dtype=torch.int64, device=device), 0, torch.arange(size))
    session.state.model.train()
    wait = torch.cuda.synchronize if "cuda" in device else lambda: None
    session.backward(batch, 1.0)  # compiles, and takes its memory
    wait()
    started = time.perf_counter()
    for _ in range(repeated_aug):  # as many in every process, since they wait for each other
        session.backward(batch, 1.0)
    wait()
    seconds = (time.perf_counter() - started) / repeated_aug * batches.parts
    session.state.optimiser.zero_grad(set_to_none=True)
    return seconds


def _augmentation(config: TrainConfig) -> str:
    a = config.augment
    parts = [
        f"crops of {a.crop_scale[0]:g}-{a.crop_scale[1]:g} of the area" if a.crop else "",
        f"flips {a.flip:g}" if a.flip else "",
        a.randaugment,
        f"erasing {a.erase:g}" if a.erase else "",
        f"mixup {a.mixup:g}" if a.mixup else "",
        f"CutMix {a.cutmix:g}" if a.cutmix else "",
        f"{a.repeated_aug} copies of an image" if a.repeated_aug > 1 else "",
        f"smoothing {config.optim.label_smoothing:g}" if config.optim.label_smoothing else "",
        f"drop path {config.model.drop_path:g}" if config.model.drop_path else "",
    ]
    return ", ".join(filter(None, parts)) or "none"


def _rates(config: TrainConfig, epoch_steps: int) -> str:
    optim = config.optim
    keys = {
        0: "step 0",
        optim.warmup_steps: "after warm-up",
        optim.steps // 2: "half-way",
        optim.steps - 1: "last",
    }
    return ", ".join(
        f"{learning_rate(step, optim):.3g} {'at ' if step == 0 else ''}{name}"
        for step, name in sorted(keys.items())
        if step < optim.steps
    )


def _count(number: int, what: str) -> str:
    ending = "es" if what.endswith(("s", "ch")) else "s"
    return f"{number:,} {what}" + ("" if number == 1 else ending)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
