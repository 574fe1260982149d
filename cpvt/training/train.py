"""Training on one page: data, forward, backward, update, log, save; one process or many.

`Trainer` is what a step works on and what is saved of it, `take_steps` is the loop, `train` opens and closes both.
"""

import math
import os
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from cpvt.config import RunConfig, TrainConfig, replace, to_json
from cpvt.data.datasets import refuse_among_images
from cpvt.data.loader import make_loader
from cpvt.data.synthetic import CLASSES
from cpvt.errors import ConfigError, DataError, TrainingError, UserError, typed
from cpvt.model.vit import VisionTransformer
from cpvt.rng import uniform
from cpvt.training.checkpoint import Checkpoints, check_state, only_run, other_run, save_model, start_from
from cpvt.training.compiled import compile_model
from cpvt.training.distributed import World, join_world, pick_device, say
from cpvt.training.evaluate import accuracy, autocast
from cpvt.training.logger import Logger, describe
from cpvt.training.loss import TrainingLoss, load_teacher
from cpvt.training.optim import EMA, SkipCounter, add_up_biases, freeze, learning_rate, param_groups, resolve

MODEL = "model.safetensors"  # in a run's folder


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


class Trainer:
    """A run between two steps, new or taken up from `run.out`: what a step works with, and what it changes.

    Order and learning rate are functions of the step, so that `state` is all that a checkpoint has to hold.
    """

    def __init__(self, config, world: World, make=make_loader, report=None, announce=None, given=()):
        """The arguments are those of `train`."""
        self.world, run = world, config.run
        names = ("global_batch_size", "micro_batch_size", "label_smoothing")
        options = {name: getattr(config.optim, name) for name in names}
        options |= {"seed": run.seed, "augment": config.augment, "device": world.device}
        options |= {"rank": world.rank, "world_size": world.size}
        self.loader = world.main_first(lambda: make(config.data, **options))
        config, classes = _settled(config, self.loader, given), self.loader.classes
        self.config, optim, said = config, config.optim, []
        if optim.warmup_steps > optim.steps:
            said.append(f"warm-up of {optim.warmup_steps} steps, longer than the run of {optim.steps}")
            if {"optim.warmup_steps", "optim.warmup_epochs"} & {*given}:
                raise ConfigError(f"{said[0]}: the learning rate would never be reached; shorten it")
        teacher = world.main_first(lambda: load_teacher(config.distill, config.model, world.device))
        world.connect()

        self.model = VisionTransformer(config.model)
        self.model.draw(run.seed)
        self.model.bf16_tokens = run.bf16_tokens
        self.model.to(world.device, torch.float64 if run.precision == "fp64" else torch.float32)
        began = start_from(self.model, run.init, classes) if run.init else ""
        freeze(self.model, run.freeze)
        self.loss = TrainingLoss(optim.label_smoothing, config.distill.alpha, teacher)
        groups = param_groups(self.model, optim.weight_decay, optim.decay_pegs)
        self.optimizer = torch.optim.AdamW(groups, lr=optim.lr, fused=True)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        if "cuda" in world.device:
            add_up_biases(self.model)
        self.ema = EMA(self.model, optim.ema_decay) if optim.ema_decay else None
        self.skips = SkipCounter(world.device)
        self.losses: deque[Tensor] = deque(maxlen=max(20, run.log_every))  # the last ones
        self.step, self.log = 0, []  # steps taken; entries of the log
        self.saved, self.updating = 0, False  # step of the newest checkpoint; whether a step is half taken
        self.identity = {"config": to_json(config), "fingerprint": self.loader.fingerprint}
        self.identity |= {"classes": [*classes], "teacher": self.loss.sha256}
        self.checkpoints = Checkpoints(Path(run.out) / "checkpoints", run.keep_checkpoints)
        notes = self._resume() if run.out else []

        if run.compile != "off":
            first = self.loader.sampler.micro_batches[0]
            B, like = first.stop - first.start, self.parameters[0]
            scale = drop_path_scale(self.model, 0, torch.arange(B), run.seed, like=like)
            compile_model(self.model, self.loss, run, B, scale)
        self.forward = world.wrap(self.model)
        if began and not self.step:
            (said if announce else notes).append(began)
        if announce and world.is_main:
            announce("\n".join([describe(config, self.model, self.loader, world), *said]))
        bar = bool(announce)
        self.logger = world.main_first(lambda: Logger(config, self.step, self.log, world, report, bar))
        for note in notes:
            self.logger.note(self.step, note)

    def _resume(self) -> list[str]:
        """Takes up the newest whole checkpoint, the same in all processes, if there is one; -> what to say."""
        own = self.identity, self.optimizer, self.ema.average if self.ema else []
        check = lambda saved: check_state(saved, *own)  # noqa: E731
        step, spoiled = self.checkpoints.latest(check) if self.world.is_main else (0, [])
        notes = [f"passed over {name}: it is not what was written" for name in spoiled]
        step, out = int(self.world.broadcast(str(step))), f"run.out={self.config.run.out!r}"
        if not step:
            made = self.world.is_main and not spoiled and (self.checkpoints.folder.parent / MODEL).exists()
            if self.world.any(made):
                raise ConfigError(f"{out} holds a {MODEL} and no checkpoint of its run: give another folder")
            return notes
        saved = self.checkpoints.read(step)
        if self.world.any(saved is None):
            raise ConfigError(f"{out}: not every process can read step {step}; use a disk that all share")
        if found := other_run(self.identity, saved):
            raise ConfigError(f"{out} holds another run ({'; '.join(found)}): give another folder")
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step, self.saved, self.log = saved["step"], saved["step"], saved["log"]
        self.losses.extend(saved["losses"].to(self.world.device))
        self.skips.counts.copy_(saved["skips"])
        if self.ema:
            torch._foreach_copy_(self.ema.average, saved["ema"])
        return [*notes, f"going on after step {self.step}"]

    def state(self) -> dict:
        """-> tensors, numbers and text alone, which `torch.load(weights_only=True)` reads back."""
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        state |= {"step": self.step, "log": self.log, "losses": torch.stack([*self.losses])}
        state |= {"skips": self.skips.counts, "ema": self.ema.average if self.ema else []}
        return state | self.identity

    def save(self, alone: bool = False) -> None:
        """Writes a checkpoint; the others wait for it, so that nobody leaves, and is counted as lost, before."""
        if self.config.run.out and self.world.is_main:
            try:
                self.checkpoints.save(self.step, self.state())
                self.saved = self.step
            except OSError as error:  # a full disk: the older ones are whole, and there may be room later
                self.logger.note(self.step, f"no checkpoint after step {self.step}: {error}")
        if not alone:
            self.world.any(False)

    def rescue(self, error: Exception) -> None:
        """Keeps the steps before an error that comes from outside of them, such as the loss of a reader."""
        if not self.updating and self.step > self.saved and not isinstance(error, TrainingError):
            with suppress(Exception):  # the first error is the one to tell
                self.save(alone=True)
        if self.saved and isinstance(error, UserError):
            error.args = (f"{error}; the same command goes on after step {self.saved}",)

    def evaluate(self) -> dict[str, float]:
        """Top-1 and top-5 of the weights and, as `ema_top1`, of their average; none if a signal cut it short."""
        options = {"precision": self.config.run.precision, "stop": lambda: bool(self.world.signals.name)}
        scores = accuracy(self.model, self.loader.eval_batches(), self.world, **options)
        if self.ema:
            with self.ema.in_place():
                average = accuracy(self.model, self.loader.eval_batches(), self.world, **options)
            scores |= {f"ema_{name}": value for name, value in average.items() if name != "images"}
        self.logger.faults(self.step, self.loader.unread.values())
        return {} if self.world.stopped() else scores

    def mean_loss(self, count: int) -> float:
        """Of the last steps, without those that were not finite. Waits for the device."""
        return float(torch.stack([*self.losses][-count:]).nanmean())

    def is_done(self) -> bool:
        """Whether all steps are taken, or the mean loss of the last 20 is as low as `stop_loss` asks for."""
        limit = self.config.optim.stop_loss
        good = limit and len(self.losses) >= 20 and self.mean_loss(20) < limit
        return bool(good) or self.step >= self.config.optim.steps


def _settled(config: TrainConfig, loader, given: Collection[str]) -> TrainConfig:
    """The configuration with the classes and size of the data, in steps. Raises UserError where `given` differ."""
    if loader.num_classes < 2:
        raise DataError(f"data.name={config.data.name!r}: one class, nothing to learn; give two or more")
    found = {"num_classes": loader.num_classes, "image_size": loader.image_size}
    for name, there in found.items():
        if f"model.{name}" in given and (asked := getattr(config.model, name)) != there:
            raise ConfigError(f"model.{name}={asked}, but the data has {there}: leave it out")
    return resolve(replace(config, model=replace(config.model, **found)), loader.sampler.steps_per_epoch)


@contextmanager
def settings(run: RunConfig) -> Iterator[None]:
    """What a run needs of PyTorch as a whole: float32 by default and, where asked for, determinism and room for
    compiled code. Afterwards all of it is as it was."""
    with ExitStack() as stack:
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        if run.deterministic:
            strict = torch.are_deterministic_algorithms_enabled()
            warns = torch.is_deterministic_algorithms_warn_only_enabled()
            stack.callback(torch.use_deterministic_algorithms, strict, warn_only=warns)
            torch.use_deterministic_algorithms(True)
            stack.callback(setattr, torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
            torch.backends.cudnn.benchmark = False
            if "CUBLAS_WORKSPACE_CONFIG" not in os.environ:
                stack.callback(os.environ.pop, "CUBLAS_WORKSPACE_CONFIG")
                os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read when CUDA starts
        if run.compile != "off":
            # A block is one function to torch.compile: what was compiled for one serves every other that is alike.
            # Where encodings have a part in attention each block has its own, hence the room for many.
            room = torch._dynamo.config.patch(recompile_limit=1024, accumulated_recompile_limit=1024)
            stack.enter_context(room)
        yield


def drop_path_scale(model: VisionTransformer, epoch: int, positions: Tensor, seed: int, like: Tensor):
    """Positions (B,) int64 on the CPU -> what the samples' branches are multiplied by, (depth, 2, B), of the type
    and device of `like`; None where nothing drops."""
    if not model.config.drop_path:
        return None
    branch = torch.arange(2 * len(model.blocks)).view(-1, 2, 1)
    draws = uniform("drop path", seed, epoch, positions[None, None], branch)
    scale = model.drop_path_scale(draws).to(like.dtype)
    return (scale.pin_memory() if like.is_cuda else scale).to(like.device, non_blocking=True)


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
    started = time.perf_counter()
    device = pick_device(config.run.device)
    if config.run.out and config.data.name not in CLASSES:
        refuse_among_images(config.run.out, config.data.name)
    own, out = settings(config.run), config.run.out
    with own, join_world(device) as world, only_run(out if world.is_main else ""):
        trainer = Trainer(config, world, make_loader, report, announce, given)
        model, config, logger = trainer.model, trainer.config, trainer.logger
        run = TrainingRun(model, config, fingerprint=trainer.loader.fingerprint)
        with closing(logger):
            try:
                run.metrics = take_steps(trainer)
            except Exception as error:
                trainer.rescue(error)
                if not world.is_main:  # of whose errors the command line says nothing
                    say(f"process {world.rank}: {error}")
                operator, lacking, _ = str(error).partition(" does not have a deterministic implementation")
                if lacking:
                    words = f"{operator} has no deterministic implementation on {world.device}"
                    raise TrainingError(f"run.deterministic: {words}; run without it") from error
                raise
            run.model.eval()
            run.history, run.steps = logger.history, trainer.step
            run.faults = int(world.sum(torch.tensor(len(logger.faulty), device=world.device)))
            if not run.metrics:
                run.interrupted = world.signals.name or "a signal to another process"
                return run
            run.seconds = round(time.perf_counter() - started, 1)
            logger.entry({"step": run.steps, **run.metrics, "faults": run.faults, "seconds": run.seconds})
        if config.run.out and world.is_main:
            folder, classes = Path(config.run.out), trainer.loader.classes
            try:
                save_model(folder / MODEL, model, config, classes)
                if trainer.ema:
                    with trainer.ema.in_place():
                        save_model(folder / "model_ema.safetensors", model, config, classes)
            except OSError as error:
                words = f"the model cannot be written to {folder} ({error.strerror})"
                raise TrainingError(f"{words}: make room, and the same command writes it") from error
        return run
