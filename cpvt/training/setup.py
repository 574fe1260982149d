"""Everything that a run needs before its first step, from a configuration."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from cpvt.config import TrainConfig
from cpvt.data.device import send
from cpvt.data.loader import Batch, Diagnostics, Images, Share, open_batches
from cpvt.errors import ConfigError
from cpvt.model.vit import VisionTransformer
from cpvt.model.zoo import load_weights
from cpvt.rng import uniform
from cpvt.training.checkpoint import Checkpoints
from cpvt.training.distributed import World
from cpvt.training.loss import Criterion, load_teacher
from cpvt.training.optim import resolved
from cpvt.training.state import State

PRECISIONS = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Session:
    """A run that is ready to go, or to go on.

    config       with steps, classes and image size settled by the data
    forward      the model, compiled and wrapped for many processes where that is asked for
    first        steps that were taken before
    notes        what a person should hear about the start
    """

    config: TrainConfig
    world: World
    batches: Diagnostics | Images
    state: State
    objective: Criterion
    forward: nn.Module
    checkpoints: Checkpoints
    first: int = 0
    notes: list[str] = field(default_factory=list)

    def backward(self, batch: Batch, share: float) -> Tensor:
        """Gradients of `share` times a micro-batch's loss, added to those at hand; -> that part of the loss."""
        precision = PRECISIONS[self.config.run.precision]
        dtype = torch.float64 if precision == torch.float64 else torch.float32
        images, model = batch.images.to(dtype), self.state.model
        keep = drop_path_factors(model, batch.epoch, batch.positions, self.config.run.seed)
        half = precision.itemsize == 2
        if keep is not None:
            keep = send(keep.to(dtype), images.device)
        with torch.autocast(images.device.type, precision if half else None, enabled=half):
            logits = self.forward(images, keep)
            loss = self.objective(logits, images, batch.targets) * share
        self.state.scaler.scale(loss).backward()
        return loss.detach()


def set_up(config: TrainConfig, world: World, open_data: Callable = open_batches) -> Session:
    """Opens the data, builds model, teacher and optimiser, and takes up the run that `run.out` holds, if any.

    `open_data`: what gives the batches, with the arguments and the result of `cpvt.data.loader.open_batches`.
    """
    run, augment = config.run, config.augment
    if run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(run.deterministic)
    checkpoints = Checkpoints(Path(run.out) / "checkpoints" if run.out else "", run.keep_checkpoints)
    if run.out and world.chief:
        checkpoints.lock()
    batches = world.first(
        lambda: open_data(
            config.data,
            config.optim.global_batch_size,
            run.seed,
            world.device,
            Share(world.rank, world.size, config.optim.micro_batch_size),
            augment=augment,
            smoothing=config.optim.label_smoothing,
        )
    )
    config = _settled(replace(config, augment=augment), batches)
    torch.manual_seed(run.seed)
    model = VisionTransformer(config.model)
    model.to(world.device, torch.float64 if run.precision == "fp64" else torch.float32)
    if run.init:
        load_weights(model, run.init, resample=True)
    teacher = world.first(lambda: load_teacher(config.distill, config.model, world.device))
    objective = Criterion(config.optim.label_smoothing, config.distill, teacher)
    state = State(model, config, world.device, batches.fingerprint)
    notes: list[str] = []
    _take_up(state, checkpoints, world, notes)
    if run.compile == "model":
        model.compile()  # in place: the parameters keep their names
        if teacher:
            teacher.compile()
    if run.compile == "blocks":
        _compile_blocks(model)
    forward = world.wrap(model)
    return Session(config, world, batches, state, objective, forward, checkpoints, state.steps, notes)


def _compile_blocks(model: VisionTransformer) -> None:
    """A block is one function to torch.compile, and what was compiled for one block or model serves every other
    that is alike; where encodings have a part in attention each block has its own, hence the room for many."""
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1024
    for block in model.blocks:
        block.compile()


def _settled(config: TrainConfig, batches: Diagnostics | Images) -> TrainConfig:
    """Classes, image size and length of the run, as the data has them."""
    try:
        model = replace(config.model, num_classes=batches.num_classes, image_size=batches.image_size)
    except ConfigError as error:
        drawn = "; drawn images have data.grid x data.pixels" if batches.fingerprint == "drawn" else ""
        raise ConfigError(f"{error}{drawn}: change data or model.patch_size") from None
    return resolved(replace(config, model=model), batches.stream.steps)


def _take_up(state: State, checkpoints: Checkpoints, world: World, notes: list[str]) -> None:
    """Puts the state at the newest whole checkpoint, the same in all processes; nothing where there is none."""
    saved, name = None, ""
    if world.chief:
        spoiled = lambda path: notes.append(f"passed over {path.name}: it is not what was written")  # noqa: E731
        if saved := checkpoints.latest(spoiled):
            name = checkpoints.name_of(saved[0])
    if not (name := world.told(name)):
        return
    saved = saved or checkpoints.read(name)
    if world.any(saved is None):
        raise ConfigError(
            f"checkpoint {name} cannot be read in every process: run.out={state.config.run.out!r} "
            "must be a folder that all nodes share"
        )
    state.restore(*saved)
    notes.append(f"going on after step {state.steps}")


def drop_path_factors(model: VisionTransformer, epoch: int, positions: Tensor, seed: int) -> Tensor | None:
    """What the branches are multiplied by for these samples: (depth, 2, B) float64; None where nothing drops."""
    if not model.config.drop_path:
        return None
    branch = torch.arange(2 * len(model.blocks)).view(-1, 2, 1)
    return model.drop_path_scale(uniform("drop path", seed, epoch, positions[None, None], branch))


def pick_device(name: str) -> str:
    """ "auto" -> "cuda" where there is one, else "cpu". Raises ConfigError for a device that is not here."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise ConfigError(f"device={name!r}; expected 'auto', 'cpu' or 'cuda'")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device='cuda', but PyTorch sees no GPU here; use device='cpu' or 'auto'")
    return name
