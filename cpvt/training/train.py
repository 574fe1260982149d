"""Training on one page: data, forward, backward, update, log, save; one process or many.

`take_steps` is the loop, `train` opens and closes what it works on, a `Trainer`.
"""

import math
import time
from collections.abc import Callable, Collection
from contextlib import closing, nullcontext
from dataclasses import dataclass, field

import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from cpvt.config import TrainConfig
from cpvt.data.datasets import refuse_among_images
from cpvt.data.loader import make_loader
from cpvt.data.synthetic import CLASSES
from cpvt.errors import TrainingError, typed
from cpvt.model.vit import VisionTransformer
from cpvt.training.checkpoint import only_run
from cpvt.training.distributed import join_world, pick_device
from cpvt.training.evaluate import autocast
from cpvt.training.optim import learning_rate
from cpvt.training.trainer import Trainer, drop_path_scale, settings


@dataclass
class TrainingRun:
    """What a training run leaves: the model in evaluation mode, its configuration, its log, its result."""

    model: VisionTransformer
    config: TrainConfig
    history: list[dict] = field(default_factory=list)  # one entry a logged step
    metrics: dict[str, float] = field(default_factory=dict)  # none where it was interrupted
    fingerprint: str = ""  # of the training images
    seconds: float = 0.0  # of this call; an earlier, interrupted part is not in it
    steps: int = 0  # taken; fewer than configured after an early stop
    faults: int = 0  # images that could not be used, in this call
    interrupted: str = ""  # the signal that ended it; the same call goes on from there


def take_steps(t: Trainer) -> dict[str, float]:
    """All steps that are left, and the last evaluation; -> its scores, none where a signal came in between."""
    world, model, loader, optim, run = t.world, t.model, t.loader, t.config.optim, t.config.run
    parts, epoch_steps = loader.micro_batches_per_step, loader.sampler.steps_per_epoch
    done, stopped = t.is_done(), world.stopped()
    # A signal waits for the end of a step. The first one may compile for minutes, and there is nothing to save.
    world.signals.urgent = world.size == 1 and not done
    model.train()
    with closing(loader.train_batches(t.step)) as batches:
        while not (done or stopped):
            # A run that goes on after this step begins with this evaluation, unless it was made.
            due = run.evaluate_every and t.step and t.step % (epoch_steps * run.evaluate_every) == 0
            if due and not any(entry["step"] == t.step and "top1" in entry for entry in t.log):
                if not (scores := t.evaluate()):
                    t.save()
                    return {}
                t.logger.entry({"step": t.step, **scores})

            # Data, forward, backward: the gradients of the micro-batches add up.
            dtype = t.parameters[0].dtype
            loss = torch.zeros((), device=world.device, dtype=dtype)
            for part in range(1, parts + 1):
                batch = next(batches)
                t.logger.faults(t.step, batch.faults, batch.refused)
                images, at = batch.images.to(dtype), batch.request
                scale = drop_path_scale(model, at.epoch, at.positions, run.seed, like=images)
                with t.forward.no_sync() if world.size > 1 and part < parts else nullcontext():
                    with autocast(world.device, run.precision):
                        logits = t.forward(images, scale)
                        part_loss = t.loss(logits, images, batch.targets) / parts
                    part_loss.backward()
                loss += part_loss.detach()
            loss = world.sum(loss) / world.size  # the same everywhere, so that all skip the same steps
            world.signals.urgent = False

            # Update. The device itself skips a step whose loss or gradient is not finite: nobody waits for it.
            norm = get_total_norm([p.grad for p in t.parameters if p.grad is not None])
            t.updating = True
            taken = t.skips.see(loss, norm)
            if optim.clip_grad:
                clip_grads_with_norm_(t.parameters, optim.clip_grad, norm)
            lr = learning_rate(t.step, optim)
            for group in t.optimizer.param_groups:
                group["lr"] = lr
            t.optimizer.found_inf = 1 - taken  # where it is 1, fused AdamW leaves everything as it is
            t.optimizer.step()
            t.optimizer.zero_grad(set_to_none=True)
            if t.ema:
                t.ema.update(taken)
            t.losses.append(loss)
            t.step += 1
            t.updating = False

            # Log. The host waits for the device at an entry, and where skipped steps are looked at.
            t.logger.step(t.step)
            done, stopped = t.is_done(), world.stopped()
            due = done or t.step % run.log_every == 0
            if due or t.step % optim.skip_limit == 0:
                skipped, in_a_row = t.skips.counts.tolist()
                if in_a_row >= min(optim.skip_limit, optim.steps):
                    words = f"step {t.step}: no finite loss or gradient in the last {in_a_row} steps"
                    raise TrainingError(f"{words}; begin anew with lr below {optim.lr:g} or clip_grad")
            if due:
                numbers = {"loss": t.mean_loss((t.step - 1) % run.log_every + 1), "grad_norm": float(norm)}
                numbers = {k: float(f"{v:.5g}") if math.isfinite(v) else None for k, v in numbers.items()}
                t.logger.entry({"step": t.step, **numbers, "lr": lr, "skipped": skipped})

            # Save.
            if done or stopped or t.step % (run.save_every or epoch_steps) == 0:
                t.save()
    return {} if stopped else t.evaluate()


@typed
def train(
    config: TrainConfig,
    report: Callable[[dict], None] | None = None,
    announce: Callable[[str], None] | None = None,
    make_loader: Callable = make_loader,
    given: Collection[str] = (),
) -> TrainingRun:
    """Trains as configured and evaluates on the held-out split; goes on where a run in `run.out` stopped.

    The model's classes and image size are taken from the data. `report` is called with each log entry, `announce`
    with what the run will do, before it does it, `make_loader` for other batches than the package's own. `given`
    are options, as "model.num_classes", that a user has asked for: where the data is otherwise, that is refused.
    Under torchrun all processes call it alike. Raises ConfigError or DataError before the first step, where the
    configuration cannot be run, TrainingError after `optim.skip_limit` steps in a row that are not finite or where
    the model cannot be written, and Stopped for a signal before the first step is done.

    The process is left as it was found, but for PyTorch's own random numbers: those that follow are other ones.
    """
    started, device, out = time.perf_counter(), pick_device(config.run.device), config.run.out
    if out and config.data.name not in CLASSES:
        refuse_among_images(out, config.data.name)
    with settings(config.run), join_world(device) as world, only_run(out if world.is_main else ""):
        trainer = Trainer(config, world, make_loader, report, announce, given)
        model, config, logger = trainer.model, trainer.config, trainer.logger
        run = TrainingRun(model, config, fingerprint=trainer.loader.fingerprint)
        with closing(logger):
            try:
                run.metrics = take_steps(trainer)
            except Exception as error:
                trainer.rescue(error)
                raise
            run.model.eval()
            run.history, run.steps = logger.history, trainer.step
            run.faults = int(world.sum(torch.tensor(len(logger.faulty), device=world.device)))
            if not run.metrics:
                run.interrupted = world.signals.name or "a signal to another process"
                return run
            run.seconds = round(time.perf_counter() - started, 1)
            logger.entry({"step": run.steps, **run.metrics, "faults": run.faults, "seconds": run.seconds})
        if out and world.is_main:
            trainer.save_models()
        return run
