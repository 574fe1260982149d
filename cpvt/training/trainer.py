"""A training run between two steps: what a step works on, what is saved of it, how it is taken up again."""

import os
from collections import deque
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from cpvt.config import RunConfig, TrainConfig, replace, to_json
from cpvt.data.loader import make_loader
from cpvt.errors import ConfigError, DataError, TrainingError, UserError
from cpvt.model.vit import VisionTransformer
from cpvt.rng import uniform
from cpvt.training.checkpoint import Checkpoints, check_state, other_run, save_model, start_from
from cpvt.training.compiled import compile_model
from cpvt.training.distributed import World, say
from cpvt.training.evaluate import accuracy
from cpvt.training.logger import Logger, describe
from cpvt.training.loss import TrainingLoss, load_teacher
from cpvt.training.optim import EMA, SkipCounter, add_up_biases, freeze, param_groups, resolve

MODEL = "model.safetensors"  # in a run's folder


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


def _settled(config: TrainConfig, loader, given: Collection[str]) -> TrainConfig:
    """The configuration with the classes and size of the data, in steps. Raises UserError where `given` differ."""
    if loader.num_classes < 2:
        raise DataError(f"data.name={config.data.name!r}: one class, nothing to learn; give two or more")
    found = {"num_classes": loader.num_classes, "image_size": loader.image_size}
    for name, there in found.items():
        if f"model.{name}" in given and (asked := getattr(config.model, name)) != there:
            raise ConfigError(f"model.{name}={asked}, but the data has {there}: leave it out")
    return resolve(replace(config, model=replace(config.model, **found)), loader.sampler.steps_per_epoch)


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
        self.average = self.ema.average if self.ema else []
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
        check = partial(check_state, own=self.identity, optimizer=self.optimizer, average=self.average)
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
            torch._foreach_copy_(self.average, saved["ema"])
        return [*notes, f"going on after step {self.step}"]

    def state(self) -> dict:
        """-> tensors, numbers and text alone, which `torch.load(weights_only=True)` reads back."""
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        state |= {"step": self.step, "log": self.log, "losses": torch.stack([*self.losses])}
        return state | {"skips": self.skips.counts, "ema": self.average, **self.identity}

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
        """Keeps the steps before an error that comes from outside of them, such as the loss of a reader, and says
        what can be done. Raises TrainingError for an operator that is not deterministic."""
        if not self.updating and self.step > self.saved and not isinstance(error, TrainingError):
            with suppress(Exception):  # the first error is the one to tell
                self.save(alone=True)
        if self.saved and isinstance(error, UserError):
            error.args = (f"{error}; the same command goes on after step {self.saved}",)
        if not self.world.is_main:  # of whose errors the command line says nothing
            say(f"process {self.world.rank}: {error}")
        operator, lacking, _ = str(error).partition(" does not have a deterministic implementation")
        if lacking:
            words = f"{operator} has no deterministic implementation on {self.world.device}"
            raise TrainingError(f"run.deterministic: {words}; run without it") from error

    def save_models(self) -> None:
        """Writes the model, and the one with averaged weights, to the run's folder."""
        folder, about = Path(self.config.run.out), (self.model, self.config, self.loader.classes)
        try:
            save_model(folder / MODEL, *about)
            if self.ema:
                with self.ema.in_place():
                    save_model(folder / "model_ema.safetensors", *about)
        except OSError as error:
            words = f"the model cannot be written to {folder} ({error.strerror})"
            raise TrainingError(f"{words}: make room, and the same command writes it") from error

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
