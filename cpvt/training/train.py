"""The loop: data, forward, backward, step, log, save, in that order; one process or many."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from cpvt.config import TrainConfig
from cpvt.data.loader import open_batches
from cpvt.model.vit import VisionTransformer
from cpvt.training.checkpoint import save_model
from cpvt.training.distributed import SignalHandler, join_world
from cpvt.training.evaluate import accuracy
from cpvt.training.logger import Monitor
from cpvt.training.optim import learning_rate
from cpvt.training.plan import describe, time_step
from cpvt.training.setup import PRECISIONS, Session, pick_device, set_up


@dataclass
class Run:
    """What a training run leaves: the model in evaluation mode, its configuration, its log, its result."""

    model: VisionTransformer
    config: TrainConfig
    history: list[dict] = field(default_factory=list)  # one entry a logged step
    metrics: dict[str, float] = field(default_factory=dict)  # none where it was interrupted
    fingerprint: str = ""  # of the training images
    seconds: float = 0.0  # of this call; an earlier, interrupted part is not in it
    steps: int = 0  # taken; fewer than configured after an early stop
    faults: int = 0  # images that could not be used
    interrupted: str = ""  # the signal that ended it; the same call goes on from there


def train(
    config: TrainConfig,
    report: Callable[[dict], None] | None = None,
    announce: Callable[[str], None] | None = None,
    open_data: Callable = open_batches,
) -> Run:
    """Trains as configured and evaluates on the held-out split; goes on where a run in `run.out` stopped.

    The model's classes and image size are taken from the data. `report` is called with each log entry, `announce`
    beforehand with the lines that say what the run will do, `open_data` (see `set_up`) for other batches than the
    package's own. Under torchrun all processes call it alike.
    Raises ConfigError or DataError, before anything is written, where the configuration cannot be run, and
    FloatingPointError after `optim.skip_limit` steps in a row without a finite gradient.
    """
    started = time.perf_counter()
    with join_world(pick_device(config.run.device)) as world, SignalHandler() as interruption:
        session = set_up(config, world, open_data)
        if announce:
            seconds = time_step(session)
            if world.chief:
                announce("\n".join(describe(session, seconds)))
        bar = bool(announce)
        with closing(Monitor(session.config, session.first, world.chief, report, bar)) as monitor:
            world.any(False)  # the logs are in order before anybody adds to them
            for note in session.notes:
                monitor.note(session.first, note)
            try:
                return _run(session, monitor, interruption, started)
            except Exception as error:
                if not world.chief:  # what the chief raises is seen; of another, only this line tells
                    print(f"process {world.rank}: {error}", file=sys.stderr)
                raise


def _run(session: Session, monitor: Monitor, interruption: SignalHandler, started: float) -> Run:
    config, world, batches, state = session.config, session.world, session.batches, session.state
    optim, run, epoch_steps = config.optim, config.run, batches.stream.steps
    model, forward, parts = state.model, session.forward, batches.parts
    result = Run(model, config, monitor.history, fingerprint=batches.fingerprint)
    last = state.steps >= optim.steps or _good_enough(session)
    stopped = world.any(bool(interruption.name))

    model.train()
    with closing(batches.micro_batches(state.steps)) as micro_batches:
        while not (last or stopped):
            # The checkpoint of this step is written: a run that goes on from it begins with this evaluation.
            if run.evaluate_every and state.steps and state.steps % (epoch_steps * run.evaluate_every) == 0:
                scores = _evaluate(session, monitor, interruption)
                if stopped := world.any(bool(interruption.name)):
                    break
                state.best = max(state.best, scores["top1"])
                monitor.entry({"step": state.steps, **scores, "best": round(state.best, 3)})

            rate = learning_rate(state.steps, optim)
            loss = torch.zeros((), device=world.device, dtype=state.parameters[0].dtype)
            for i, batch in enumerate(islice(micro_batches, parts), start=1):
                monitor.data(state.steps, batch.faults, batch.refused)
                with forward.no_sync() if world.size > 1 and i < parts else nullcontext():
                    loss += session.backward(batch, 1 / parts)
            norm = state.update(world.sum(loss) / world.size, rate)
            monitor.step()

            last = state.steps == optim.steps or _good_enough(session)
            stopped = world.any(bool(interruption.name))
            if state.steps % run.log_every == 0 or last:
                _log(session, monitor, rate, norm)
            if last or stopped or state.steps % (run.save_every or epoch_steps) == 0:
                _save(session, monitor)

    model.eval()
    result.steps = state.steps
    if not stopped:
        result.metrics = _evaluate(session, monitor, interruption)
        stopped = world.any(bool(interruption.name))
    result.faults = monitor.count_faults(world)
    if stopped:
        result.metrics, result.interrupted = {}, interruption.name or "a signal to another process"
        return result
    result.seconds = time.perf_counter() - started
    entry = {"step": state.steps, **result.metrics, "faults": result.faults}
    monitor.entry({**entry, "seconds": round(result.seconds, 1)})
    if run.out and world.chief:
        save_model(Path(run.out) / "model.safetensors", model, config)
        if state.average:
            with state.average.in_place():
                save_model(Path(run.out) / "model_ema.safetensors", model, config)
    return result


def _good_enough(session: Session) -> bool:
    recent, limit = session.state.recent, session.config.optim.stop_loss
    return bool(limit) and len(recent) == 20 and float(torch.stack(list(recent)).mean()) < limit


def _log(session: Session, monitor: Monitor, rate: float, norm: Tensor) -> None:
    """The mean loss since the last entry. Here, and only here, the host waits for the device."""
    state, optim = session.state, session.config.optim
    losses, skips = torch.stack(state.losses), state.skips.read()
    loss = round(float(losses.nanmean()), 4)
    entry = {"step": state.steps, "loss": loss if math.isfinite(loss) else None, "rate": rate}
    entry["grad_norm"] = float(f"{float(norm):.4g}") if math.isfinite(norm) else None
    entry |= {name: count for name, count in skips.items() if count and name != "in_a_row"}
    state.losses.clear()
    if skips["in_a_row"] >= min(optim.skip_limit, optim.steps):
        raise FloatingPointError(
            f"step {state.steps}: no finite loss or gradient in the last {skips['in_a_row']} steps; begin "
            f"anew, in another folder: with a lower rate ({optim.lr:g}), a clipped gradient or without fp16"
        )
    monitor.entry(entry)


def _save(session: Session, monitor: Monitor) -> None:
    state = session.state
    if session.config.run.out and session.world.chief:
        try:
            session.checkpoints.save(state.steps, state.saved())
        except OSError as error:  # a full disk: the older ones are whole, and there may be room later
            monitor.note(state.steps, f"no checkpoint after step {state.steps}: {error}")
    session.world.any(False)  # nobody leaves, and is counted as lost, before it is written


def _evaluate(session: Session, monitor: Monitor, interruption: SignalHandler) -> dict[str, float]:
    """Top-1 and top-5 of the weights and, as `ema_top1`, of their average; cut short by a signal."""
    state, batches, world = session.state, session.batches, session.world
    options = {"precision": PRECISIONS[session.config.run.precision], "stop": lambda: bool(interruption.name)}
    scores = accuracy(state.model, batches.test(), world, **options)
    if state.average:
        with state.average.in_place():
            average = accuracy(state.model, batches.test(), world, **options)
        scores |= {f"ema_{name}": value for name, value in average.items() if name != "images"}
    monitor.data(state.steps, batches.unread.values())
    return scores
